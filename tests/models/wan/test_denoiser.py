"""The denoiser's own forward compared with diffsynth's `model_fn_wan_video`, one sample at a time."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.lora.inject import inject_lora, lora_parameters
from frostline.models.tiny.architecture import DENOISER
from frostline.models.wan.denoiser import Denoiser

VARIANTS = ("tiny", "tiny-moe low noise", "tiny-moe high noise", "tiny-ti2v", "clip")
# Batch size, and frames, height and width of the latents.
SHAPES = [(1, 1, 4, 4), (2, 3, 12, 12), (3, 2, 6, 10)]


@pytest.fixture(scope="module")
def variants() -> dict[str, WanModel]:
    experts = load_components("tiny-moe")
    assert experts.denoiser_high_noise is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = WanModel(**{**DENOISER, "num_layers": 2, "has_image_input": True, "require_clip_embedding": True})
    return {
        "tiny": load_components("tiny").denoiser,
        "tiny-moe low noise": experts.denoiser,
        "tiny-moe high noise": experts.denoiser_high_noise,
        "tiny-ti2v": load_components("tiny-ti2v").denoiser,
        "clip": clip.eval().requires_grad_(False),
    }


def inputs(model: WanModel, shape: tuple[int, int, int, int], seed: int = 0) -> dict[str, Tensor]:
    batch, *grid = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator)

    given = {
        "latents": normal(16, *grid),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "context": normal(16, 64),
    }
    if model.require_vae_embedding:
        given["y"] = normal(model.in_dim - 16, *grid)
    if model.has_image_input:
        given["clip_feature"] = normal(257, 1280)
    return given


def plain(model: WanModel, given: dict[str, Tensor]) -> Tensor:
    """Run diffsynth one sample at a time: it takes one timestep for all samples if the first frame is fixed."""
    rows = []
    for index in range(len(given["latents"])):
        row: dict[str, Any] = {name: tensor[index : index + 1] for name, tensor in given.items()}
        rows.append(model_fn_wan_video(model, fuse_vae_embedding_in_latents=model.seperated_timestep, **row))
    return torch.cat(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_diffsynth(variant: str, shape: tuple[int, int, int, int], variants: dict[str, WanModel]) -> None:
    model = variants[variant]
    given = inputs(model, shape)
    actual = Denoiser(model)(**given)
    assert actual.shape == given["latents"].shape
    assert (actual - plain(model, given)).abs().max() <= 1e-5
    assert actual.std() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_diffsynth(variant: str, variants: dict[str, WanModel]) -> None:
    model = copy.deepcopy(variants[variant]).requires_grad_(True)
    given = inputs(model, (2, 2, 4, 6))
    target = torch.randn(given["latents"].shape, generator=torch.Generator().manual_seed(1))

    def gradient(velocity: Tensor) -> Tensor:
        (velocity * target).sum().backward()
        parts = [p.grad.flatten() for p in [*model.parameters(), *given.values()] if p.grad is not None]
        for tensor in [*model.parameters(), *given.values()]:
            tensor.grad = None
        return torch.cat(parts).double()

    for name in given.keys() - {"timestep"}:
        given[name].requires_grad_(True)
    expected, actual = gradient(plain(model, given)), gradient(Denoiser(model)(**given))
    assert actual.shape == expected.shape
    assert F.cosine_similarity(actual, expected, dim=0) >= 1 - 1e-9
    assert (actual.norm() / expected.norm() - 1).abs() <= 1e-5


@pytest.mark.parametrize("variant", ["tiny", "tiny-ti2v", "clip"])
def test_gradient_checkpointing_changes_nothing(variant: str, variants: dict[str, WanModel]) -> None:
    model = copy.deepcopy(variants[variant]).requires_grad_(True)
    denoiser = Denoiser(model)
    given = inputs(model, (2, 2, 4, 6))
    given["latents"].requires_grad_(True)
    outcomes = []
    for denoiser.checkpoint_blocks in (False, True):
        velocity = denoiser(**given)
        velocity.square().sum().backward()
        tensors = [given["latents"], *model.parameters()]
        outcomes.append([velocity.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)])
        for tensor in tensors:
            tensor.grad = None
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)


# Inductor miscompiles a transposed input for one sample of 108 tokens, which is not a multiple of a vector register.
@pytest.mark.parametrize(
    ("checkpoint_blocks", "shape"),
    [(False, (2, 3, 12, 12)), (False, (1, 3, 12, 12)), (False, (1, 1, 10, 6)), (True, (2, 3, 12, 12))],
)
def test_compiled_blocks_compute_the_same(
    checkpoint_blocks: bool, shape: tuple[int, int, int, int], variants: dict[str, WanModel]
) -> None:
    """Compare values and gradients."""
    denoiser, trained = with_lora(variants["tiny"])
    denoiser.checkpoint_blocks = checkpoint_blocks
    given = inputs(denoiser.model, shape)
    latents = given["latents"].requires_grad_()
    weights = torch.randn_like(latents)

    def velocity_and_gradient() -> tuple[Tensor, Tensor]:
        velocity = denoiser(**given)
        gradients = torch.autograd.grad((velocity * weights).sum(), [latents, *trained])
        return velocity.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    expected, wanted = velocity_and_gradient()
    denoiser.compile_blocks()
    actual, gradient = velocity_and_gradient()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert F.cosine_similarity(gradient, wanted, dim=0) > 0.999999
    assert abs(gradient.norm() / wanted.norm() - 1) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(denoiser(**given), expected, atol=1e-5, rtol=0)


def test_a_trace_holds_the_operations_and_not_what_was_compiled_of_them(variants: dict[str, WanModel]) -> None:
    denoiser, _ = with_lora(variants["tiny"])
    given = inputs(denoiser.model, (1, 1, 10, 6))
    traces = {}
    for compiled in (False, True):
        if compiled:
            denoiser.compile_blocks()
            denoiser(**given).sum().backward()
        for denoiser.checkpoint_blocks in (False, True):
            graph = torch.export.export(denoiser, (), given).graph
            traces[compiled, denoiser.checkpoint_blocks] = [node.target for node in graph.nodes]
    for checkpoint_blocks in (False, True):
        assert traces[True, checkpoint_blocks] == traces[False, checkpoint_blocks]


def with_lora(model: WanModel) -> tuple[Denoiser, list[Tensor]]:
    """Return a denoiser with a LoRA that changes its output, and the LoRA matrices."""
    model = copy.deepcopy(model)
    inject_lora(model, 8)
    trained = list(lora_parameters(model).values())
    with torch.no_grad():
        for matrix in trained:
            matrix.normal_(std=0.03)
    return Denoiser(model), [*trained]


def test_gradient_checkpointing_keeps_less(variants: dict[str, WanModel]) -> None:
    def kept_bytes(checkpoint_blocks: bool) -> int:
        model = variants["tiny"]
        denoiser = Denoiser(model)
        denoiser.checkpoint_blocks = checkpoint_blocks
        given = inputs(model, (1, 2, 8, 8))
        given["latents"].requires_grad_(True)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            denoiser(**given)
        return sum(kept.values())

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


@pytest.mark.parametrize("variant", ["tiny", "tiny-ti2v"])
@torch.no_grad()
def test_bf16_rounds_the_weights_and_no_table(variant: str, variants: dict[str, WanModel]) -> None:
    model = variants[variant]
    denoiser = Denoiser(model)
    given = inputs(model, (2, 3, 8, 8))
    exact = denoiser(**given)
    tables = {name: table.clone() for name, table in denoiser.named_buffers()}
    half = Denoiser(copy.deepcopy(model)).to(torch.bfloat16)
    assert half.model.patch_embedding.weight.dtype == torch.bfloat16
    assert len(tables) == 8
    for name, table in half.named_buffers():
        assert table.dtype == torch.float32
        assert torch.equal(table, tables[name])
    rounded = half(**{name: t if name == "timestep" else t.bfloat16() for name, t in given.items()})
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 1e-5 < error < 3e-2


@torch.no_grad()
def test_every_sample_has_its_own_timestep(variants: dict[str, WanModel]) -> None:
    for variant in ("tiny", "tiny-ti2v"):
        denoiser = Denoiser(variants[variant])
        given = inputs(variants[variant], (3, 2, 4, 4))
        together = denoiser(**given)
        for index in range(3):
            alone = denoiser(**{name: tensor[index : index + 1] for name, tensor in given.items()})
            torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=0)
        given["timestep"] = given["timestep"].flip(0)
        assert (denoiser(**given)[0] - together[0]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bf16_weights_embed_timesteps_in_fp32_and_round_once(variant: str, variants: dict[str, WanModel]) -> None:
    """Embed like Wan's own code. diffsynth rounds timestep, sinusoid and every layer, so its error is larger."""
    half = Denoiser(copy.deepcopy(variants[variant]).to(torch.bfloat16))
    # The same rounded weights in fp32.
    exact = Denoiser(copy.deepcopy(half.model).float())
    errors: dict[str, list[Tensor]] = {"ours": [], "diffsynth": []}
    for seed in range(6):
        given = inputs(half.model, (2, 2, 8, 8), seed)
        rounded = {name: t if name == "timestep" else t.bfloat16() for name, t in given.items()}
        embedded = exact._time_embedding(given["timestep"], (2, 4, 4), torch.float32)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = half._time_embedding(given["timestep"], (2, 4, 4), torch.bfloat16)
            assert all(torch.equal(one, wide.bfloat16()) for one, wide in zip(found, embedded, strict=True))
        expected = exact(**{name: tensor.float() for name, tensor in rounded.items()})
        theirs = plain(half.model, {name: tensor.bfloat16() for name, tensor in given.items()})
        for name, velocity in (("ours", half(**rounded)), ("diffsynth", theirs)):
            errors[name].append((velocity.float() - expected).norm() / expected.norm())
    assert torch.stack(errors["ours"]).mean() < torch.stack(errors["diffsynth"]).mean()


def test_a_lora_on_the_timestep_embedding_of_bf16_weights_has_a_gradient_and_a_trace(
    variants: dict[str, WanModel],
) -> None:
    model = copy.deepcopy(variants["tiny"]).to(torch.bfloat16)
    inject_lora(model, 2, target_modules=["time_embedding.0", "time_projection.1"])
    denoiser = Denoiser(model)
    trained = lora_parameters(model)
    with torch.no_grad():
        for matrix in trained.values():
            matrix.normal_(std=0.1)
    given = {name: t if name == "timestep" else t.bfloat16() for name, t in inputs(model, (1, 1, 4, 4)).items()}
    velocity = denoiser(**given)
    gradients = torch.autograd.grad(velocity.float().square().sum(), [*trained.values()])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    traced = torch.export.export(denoiser, (), given).module()
    torch.testing.assert_close(traced(**given), velocity)
