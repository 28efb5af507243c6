"""Stages of a small model with random weights in any precision, and checks that apply to every runner."""

import math
import threading
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from frostline.export.parity import compare
from frostline.models.faces.detectors import mtcnn_model
from frostline.models.faces.embedders import load_embedder
from frostline.models.faces.mtcnn_networks import load_mtcnn_networks
from frostline.models.lora.inject import adapters_off, inject_lora, lora_parameters
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.models.wan.model_spec import ModelSpec
from frostline.models.wan.networks import build_network
from frostline.rewards.face_identity.detector import detector_tolerance
from frostline.rewards.face_identity.stages import FaceModels, build_face_stages
from frostline.runtime.device import full_fp32
from frostline.runtime.stage import Network, Runner, Stage
from frostline.stages.shapes import ShapeRange
from frostline.stages.tolerances import tolerance
from frostline.stages.wan.model import WanVideoModel

SHAPES = ShapeRange(
    batch=(1, 2, 4),
    latent_frames=(1, 2, 5),
    height=(32, 64, 128),
    width=(32, 64, 128),
    rank=(2, 8, 32),
    faces=(1, 5, 32),
    face_height=(12, 41, 128),
    face_width=(12, 40, 128),
)

SPEC = ModelSpec(
    "small",
    {
        "vae": {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        "text_encoder": {
            **{"vocab": 32, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 2, "num_layers": 1},
            **{"num_buckets": 8, "dropout": 0.0},
        },
        "denoiser": {
            **{"dim": 64, "in_dim": 36, "ffn_dim": 128, "out_dim": 16, "text_dim": 32, "freq_dim": 32, "eps": 1e-6},
            **{"patch_size": (1, 2, 2), "num_heads": 2, "num_layers": 1},
            **{"has_image_input": False, "require_clip_embedding": False, "require_vae_embedding": True},
            **{"seperated_timestep": False, "fuse_vae_embedding_in_latents": False},
        },
    },
    text_length=8,
)


@cache
def small_stages(dtype: torch.dtype = torch.float32, rank: int = 8, device: str = "cpu") -> dict[str, Stage]:
    """Return the stages by name. The model is cached; models of all ranks have equal base weights."""
    torch.manual_seed(0)
    tokenizer: Any = SimpleNamespace(seq_len=SPEC.text_length)
    networks: dict[str, Any] = {field: build_network(field, arguments) for field, arguments in SPEC.networks.items()}
    components = WanComponents(SPEC, tokenizer=tokenizer, **networks)
    for _, module in components.modules():
        module.eval().requires_grad_(False).to(device, dtype)
    vae, denoiser = components.vae, components.denoiser
    vae.scale = [part.to(device) for part in vae.scale]
    inject_lora(denoiser, rank, alpha=2 * rank)
    with torch.no_grad():
        for parameter in lora_parameters(denoiser).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    faces = FaceModels(
        mtcnn_model({name: network.to(device, dtype) for name, network in load_mtcnn_networks().items()}),
        torch.nn.Module.to(load_embedder("sface"), device, dtype),  # type: ignore[arg-type]
    )
    model = WanVideoModel(components, Denoiser(denoiser).to(device), None, None)
    return {stage.name: stage for stage in (*model.stages(SHAPES), *build_face_stages(faces, SHAPES))}


def network_of(
    stage: str, name: str, dtype: torch.dtype = torch.float32, rank: int = 8, device: str = "cpu"
) -> Network:
    """Return one network of `small_stages`."""
    return next(network for network in small_stages(dtype, rank, device)[stage].networks if network.name == name)


def sample_at(network: Network, seed: int = 0, **extents: int) -> dict[str, Tensor]:
    """Return random inputs at another shape: `extents` are the sizes of the dynamic dimensions by name."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for spec in network.inputs:
        shape = tuple(d if isinstance(d, int) else d.multiple * extents[d.name] for d in spec.shape)
        inputs[spec.name] = spec.random(shape, generator).to(network.device)
    return inputs


def assert_parity(network: Network, runner: Runner, inputs: Mapping[str, Tensor], stage: str = "") -> None:
    """Check that the runner computes the same as PyTorch, in the same dtype."""
    with full_fp32():
        actual, expected = runner(**inputs), network.reference(inputs)
    bounds = (detector_tolerance if stage == "face_detector" else tolerance)(network.weight.dtype)
    for measured in compare(network.name, "", expected, actual, bounds):
        assert measured.passed, measured
    assert {name: value.dtype for name, value in actual.items()} == {name: v.dtype for name, v in expected.items()}


def assert_follows_the_trainer(network: Network, runner: Runner) -> None:
    """Check that each of three optimizer steps has an effect in the same memory; scale 0 is the base model."""
    inputs, policy = network.samples("opt"), list(network.live.values())
    pointers = [tensor.data_ptr() for tensor in policy]
    before = runner(**inputs)["velocity"]
    optimizer = torch.optim.AdamW(policy, lr=1e-2)
    for _ in range(3):
        network.module(*inputs.values(), *policy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_parity(network, runner, inputs)
    assert (runner(**inputs)["velocity"] - before).norm() > 0.05 * before.norm()
    assert [tensor.data_ptr() for tensor in policy] == pointers
    off = {**inputs, "lora_scale": torch.zeros_like(inputs["lora_scale"])}
    assert_parity(network, runner, off)
    denoiser: Any = network.module.denoiser
    with torch.no_grad(), full_fp32(), adapters_off(denoiser.model):
        base = denoiser(**{name: value for name, value in inputs.items() if name != "lora_scale"})
        torch.testing.assert_close(runner(**off)["velocity"], base, atol=1e-5, rtol=0)


def assert_threads_are_served(network: Network, runner: Runner, calls: int = 25) -> None:
    """Check outputs in four threads, each with another shape, and other values in each call."""
    extents = [{"batch": 1 + i, "latent_frames": 1 + i, "height": 2 + i, "width": 8 - i} for i in range(4)]
    inputs = [[sample_at(network, seed=10 * i + n, **own) for n in range(calls)] for i, own in enumerate(extents)]
    expected = [[network.reference(each)["velocity"] for each in own] for own in inputs]
    errors: list[list[float]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def serve(index: int) -> None:
        start.wait()
        for each, right in zip(inputs[index], expected[index], strict=True):
            outputs = runner(**each)["velocity"]
            errors[index].append((outputs - right).abs().max().item() if outputs.shape == right.shape else math.inf)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(own) for own in errors] == [calls] * len(inputs), "a thread ended early"
    assert max(max(own) for own in errors) < 1e-5, errors


def assert_replaced_tensors_are_followed(network: Network, runner: Runner) -> None:
    """Check that new parameter objects, also of another layout or rank, are used in the next call; restore them."""
    model = network.module.denoiser.model  # type: ignore[union-attr]
    before = lora_parameters(model)  # type: ignore[arg-type]
    inputs = network.samples("opt")
    runner(**inputs)

    def replace(change: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in before.items():
            owner = model.get_submodule(name.rpartition(".")[0])  # type: ignore[union-attr]
            owner.weight = torch.nn.Parameter(change(parameter.detach()))

    def of_half_the_rank(matrix: Tensor) -> Tensor:
        axis = 0 if matrix.shape[0] < matrix.shape[1] else 1
        return 2 * matrix.narrow(axis, 0, matrix.shape[axis] // 2).clone()

    try:
        for change in (lambda matrix: 1.5 * matrix, lambda matrix: (2 * matrix).t().contiguous().t(), of_half_the_rank):
            outputs = runner(**inputs)["velocity"]
            replace(change)
            assert (runner(**inputs)["velocity"] - outputs).norm() > 1e-3 * outputs.norm()
            assert_parity(network, runner, inputs)
    finally:
        for name, parameter in before.items():
            model.get_submodule(name.rpartition(".")[0]).weight = parameter  # type: ignore[union-attr]
    assert_parity(network, runner, inputs)


def assert_outputs_are_the_callers(network: Network, runner: Runner) -> None:
    """Check that outputs do not change through later calls, or through writing to other outputs."""
    one, other = network.samples("opt", seed=1), network.samples("opt", seed=2)
    first = runner(**one)
    kept = {name: value.clone() for name, value in first.items()}
    second = runner(**other)
    for name, value in first.items():
        assert torch.equal(value, kept[name])
        assert value.data_ptr() != second[name].data_ptr()
        second[name].zero_()
    third = runner(**one)
    for name, value in third.items():
        torch.testing.assert_close(value, kept[name], atol=1e-6, rtol=0)
