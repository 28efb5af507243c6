"""The range of shapes of engines whose backend limits the size of tensors."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.errors import EngineError, ShapeError
from frostline.export.exporter import build_stage, export_stage
from frostline.export.limits import check_served, largest_tensor, served_note, within_limit
from frostline.export.recipe import load_recipe
from frostline.models.checkpoints.releases import read_spec
from frostline.models.wan.components import WanComponents
from frostline.models.wan.denoiser import Denoiser
from frostline.runtime import bounds
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.stage import Network, Stage, TensorSpec
from frostline.stages.wan import vae_decoder, vae_encoder
from frostline.stages.wan.inputs import StageInputs

LIMIT = 2**31 - 1


class Wide(nn.Module):
    """A network with five times as many channels inside as at both ends; with `heads`, also attention over pixels."""

    def __init__(self, heads: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 10, 3, padding=1, dtype=dtype)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        wide = self.conv(x)
        if self.heads:
            q = x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
            q = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return wide[:, :2].contiguous()


def network(heads: int = 0, dtype: torch.dtype = torch.float32, batch: tuple[int, int, int] = (1, 2, 32)) -> Network:
    height, width = (Dimension(name, 1, 2, 8, multiple=4) for name in ("height", "width"))
    spec = TensorSpec("x", (Dimension("batch", *batch), 2, height, width), dtype)
    return Network("wide", Wide(heads, dtype).eval(), (spec,), ("y",))


def largest_shape(network: Network) -> tuple[int, ...]:
    return network.inputs[0].shape_at("max")


def test_what_a_network_makes_counts() -> None:
    """Count 32 × 10 × 32 × 32 elements inside; inputs and outputs have a fifth of them."""
    largest = largest_tensor(network())
    assert largest.shape == (32, 10, 32, 32)
    assert largest.elements == 327_680
    assert str(largest) == "conv2d of 32 x 10 x 32 x 32 = 327,680 elements"


def test_inputs_count_too() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) * self.weight

    largest = largest_tensor(replace(network(), module=Mean().eval()))
    assert str(largest) == "input x of 32 x 2 x 32 x 32 = 65,536 elements"


def test_the_scores_of_attention_count_where_no_kernel_keeps_them_inside() -> None:
    scores = 32 * 1 * 1024 * 1024
    assert largest_tensor(network(heads=1)).elements == scores
    assert str(largest_tensor(network(heads=1))).startswith("attention scores of 32 x 1 x 1,024 x 1,024 = ")
    assert largest_tensor(network(heads=1, dtype=torch.bfloat16)).shape == (32, 10, 32, 32)


def test_samples_go_before_pixels() -> None:
    wide, one = network(), 10 * 32 * 32
    assert within_limit(wide, "b", None) is wide
    assert within_limit(wide, "b", 32 * one) is wide
    assert largest_shape(within_limit(wide, "b", 32 * one - 1)) == (31, 2, 32, 32)
    assert largest_shape(within_limit(wide, "b", 5 * one + 7)) == (5, 2, 32, 32)
    # The batch size is not reduced below the typical one, 2. Height and width are reduced instead, here to 20 and 28.
    assert largest_shape(within_limit(wide, "b", 2 * 10 * 20 * 20)) == (2, 2, 20, 20)
    assert largest_shape(within_limit(wide, "b", 2 * 10 * 32 * 32 - 1)) == (2, 2, 28, 28)
    # Only the typical shapes are left.
    assert largest_shape(within_limit(wide, "b", 2 * 10 * 8 * 8)) == (2, 2, 8, 8)
    with pytest.raises(
        EngineError, match=r"b supports tensors of at most 1,279 elements, but network wide has conv2d of"
    ):
        within_limit(wide, "b", 2 * 10 * 8 * 8 - 1)


def test_what_was_asked_for_is_not_lowered() -> None:
    wide = network()
    assert largest_shape(within_limit(wide, "b", 327_679, frozenset({"height", "width"}))) == (31, 2, 32, 32)
    assert largest_shape(within_limit(wide, "b", 327_679, frozenset({"batch"}))) == (32, 2, 28, 28)
    with pytest.raises(EngineError, match=r"conv2d of 32 x 10 x 32 x 32 = 327,680 elements at its maximum shapes"):
        within_limit(wide, "tensorrt", 327_679, frozenset({"batch", "height", "width"}))


def test_the_default_range_of_tiny_within_the_limit(make_module: Any) -> None:
    """Compute by hand: 16 channels of 6 padded frames, the VAE's attention of one head, the first face network."""
    stages = make_module().stages
    encoder = {network.name: network for network in stages["vae_encoder"].networks}["next"]
    padded = largest_tensor(encoder)
    assert padded.elements >= 32 * 16 * 6 * 1026 * 1026
    served = within_limit(encoder, "tensorrt", LIMIT)
    # Attention scores of 128 × 128 positions: 2^28 per video. 7 videos are below 2^31 - 1.
    assert largest_shape(served) == (7, 3, 4, 1024, 1024)
    assert largest_tensor(served).elements == 7 * (128 * 128) ** 2
    pnet = stages["face_detector"].networks[0]
    assert largest_shape(pnet) == (2048, 3, 4096, 4096)
    assert largest_shape(within_limit(pnet, "tensorrt", LIMIT)) == (LIMIT // (10 * 1022 * 1022), 3, 1024, 1024)
    unlimited = stages["face_embedder"].networks[0]
    assert within_limit(unlimited, "tensorrt", LIMIT) is unlimited


@pytest.fixture
def stage() -> Stage:
    return Stage(name="wide", model="m", networks=(network(),), tolerance=Tolerance(1e-5, 1e-5, 0.999))


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ONNX Runtime accept at most five samples of 32 × 32 pixels."""
    monkeypatch.setattr(get_backend("onnxruntime"), "largest_tensor", 5 * 10 * 32 * 32)


def test_an_engine_says_what_it_serves(stage: Stage, limited: None, tmp_path: Path) -> None:
    exported = export_stage(stage, "onnxruntime", EngineStore(tmp_path))
    (entry,) = exported.manifest.networks
    assert [tensor.max for tensor in entry.inputs] == [(5, 2, 32, 32)]
    assert served_note(stage, exported.manifest) == (
        "limited by the size of its tensors: at most x:5x2x32x32 instead of 32x2x32x32"
    )
    again = export_stage(stage, "onnxruntime", EngineStore(tmp_path))
    assert not again.built
    served = bounds.bounded(stage.networks[0], {tensor.name: tensor.max for tensor in entry.inputs})
    served.check_shapes({"x": torch.zeros(5, 2, 32, 32)})
    with pytest.raises(ShapeError, match=r"the engine supports \(1, 2, 4, 4\) to \(5, 2, 32, 32\)"):
        served.check_shapes({"x": torch.zeros(6, 2, 32, 32)})


def test_a_range_that_was_asked_for_is_refused_with_the_arithmetic(stage: Stage, limited: None, tmp_path: Path) -> None:
    asked = BuildOptions(asked_maximum=frozenset({"batch", "height", "width"}))
    with pytest.raises(
        EngineError,
        match=r"onnxruntime supports tensors of at most 51,200 elements, but network wide has conv2d of "
        r"32 x 10 x 32 x 32 = 327,680 elements at its maximum shapes: lower --max-shapes",
    ):
        build_stage(stage, "onnxruntime", EngineStore(tmp_path), options=asked)
    assert EngineStore(tmp_path).find() == []
    # The key is the same for an engine that was built without requesting this range.
    build_stage(stage, "onnxruntime", EngineStore(tmp_path))
    with pytest.raises(EngineError, match=r"supports x:5x2x32x32 instead of 32x2x32x32, which is less than requested"):
        build_stage(stage, "onnxruntime", EngineStore(tmp_path), options=asked)
    faces = BuildOptions(asked_maximum=frozenset({"faces"}))
    assert not build_stage(stage, "onnxruntime", EngineStore(tmp_path), options=faces)[1]


def test_engines_without_a_limit_have_nothing_to_say(stage: Stage, tmp_path: Path) -> None:
    exported = export_stage(stage, "onnxruntime", EngineStore(tmp_path))
    assert served_note(stage, exported.manifest) == ""
    check_served(stage, exported.manifest, frozenset({"batch"}))


def test_a_rank_out_of_range_is_refused_and_no_engine_deleted(make_module: Any, engines: Path) -> None:
    """Refuse before anything is built, and before an existing engine is loaded and compared with PyTorch."""
    from frostline.export.exporter import verify_engine_parity
    from frostline.runtime.identity.fingerprint import find_engine, weights_sha256

    store = EngineStore(engines)
    for rank in (1, 257):
        stage = make_module(lora={"rank": rank}).stages["denoiser"]
        found = find_engine(store, stage, "onnxruntime", weights_sha256(stage))
        assert found is not None, "the rank must not change the key of an engine"
        with pytest.raises(ShapeError, match=r"lora_A has shape .*, engines support .*: choose another LoRA rank"):
            export_stage(stage, "onnxruntime", store, force=True)
        with pytest.raises(ShapeError, match="choose another LoRA rank"):
            verify_engine_parity(stage, store, store.verify(found))
        assert store.get(found.id) is not None


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "Wan2.2-TI2V-5B"])
def test_the_vae_of_the_shipped_recipes_keeps_within_the_limit(name: str) -> None:
    """Check the recipe with the largest shapes for each kind of VAE: none of its shapes is refused or reduced."""
    recipe, spec = load_recipe(name, {}), read_spec(name)
    parts: dict[str, Any] = {part: spec.build(part).to(recipe.dtype) for part in ("vae", "denoiser")}
    parts["vae"].scale = [values.to("meta") for values in parts["vae"].scale]
    unused: Any = SimpleNamespace()
    components = WanComponents(spec, text_encoder=unused, tokenizer=unused, **parts)
    inputs = StageInputs(components, Denoiser(components.denoiser), None, recipe.shapes)
    for stage in (vae_encoder.build(inputs), vae_decoder.build(inputs)):
        for part in stage.networks:
            assert within_limit(part, "tensorrt", LIMIT, recipe.asked_maximum) is part
