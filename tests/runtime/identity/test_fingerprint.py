"""What identifies an engine: weights, architecture, shapes of inputs and of live tensors, code."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.manifest import EngineId, Manifest
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.identity.fingerprint import find_engine, stage_code, stage_key, weights_sha256
from frostline.runtime.stage import Network, Stage, TensorSpec

ROWS = Dimension("rows", 1, 4, 64)
MakeStage = Callable[..., Stage]


class Scaled(nn.Module):
    def __init__(self, factor: float = 2.0, rank: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor = factor
        self.layer: Any = nn.Linear(4, 4)
        if rank:
            inject_adapter_in_model(LoraConfig(r=rank, target_modules=["layer"]), self)

    def forward(self, x: Tensor, *live: Tensor) -> Tensor:
        return self.factor * self.layer(x)


def make_stage(module: nn.Module, *, rows: Dimension = ROWS, rank: Dimension | None = None) -> Stage:
    """Return a stage that computes `y = factor * layer(x)`; with a `rank`, its LoRA is live."""
    named = {n: p for n, p in module.named_parameters() if "lora_" in n} if rank else {}
    shapes = {name: (rank, 4) if "lora_A" in name else (4, rank) for name in named}
    network = Network(
        "scaled",
        module,
        (TensorSpec("x", (rows, 4)),),
        ("y",),
        live=named,
        live_specs=tuple(TensorSpec(name, shape) for name, shape in shapes.items()),  # type: ignore[arg-type]
    )
    return Stage(name="scaled", model="toy", networks=(network,), tolerance=Tolerance(1e-5, 1e-5, 0.999))


def key(stage: Stage, backend: str = "onnxruntime") -> str:
    return stage_key(stage, backend, "fp32", weights_sha256(stage))


RANK = Dimension("rank", 2, 8, 256)


def test_a_key_follows_what_is_computed() -> None:
    stages = [
        make_stage(Scaled()),
        make_stage(Scaled(2.5)),
        make_stage(Scaled(), rows=Dimension("rows", 1, 4, 32)),
        make_stage(Scaled(), rows=Dimension("rows", 1, 4, 64, multiple=2)),
        make_stage(Scaled(rank=4)),
        make_stage(Scaled(rank=4), rank=RANK),
        make_stage(Scaled(rank=4), rank=Dimension("rank", 2, 8, 128)),
    ]
    keys = [key(stage) for stage in stages]
    assert len({*keys}) == len(keys)
    assert key(make_stage(Scaled())) == keys[0]
    assert key(stages[0], "openvino") != keys[0]


def test_dimensions_that_are_one_are_told_from_two_of_equal_range() -> None:
    def stage(second: Dimension) -> Stage:
        one = make_stage(Scaled())
        specs = (TensorSpec("x", (ROWS, 4)), TensorSpec("z", (second, 4)))
        return replace(one, networks=(replace(one.networks[0], inputs=specs),))

    assert key(stage(ROWS)) != key(stage(replace(ROWS, name="others")))


def test_the_rank_and_values_of_a_live_adapter_do_not_count() -> None:
    four, eight = make_stage(Scaled(rank=4), rank=RANK), make_stage(Scaled(rank=8), rank=RANK)
    assert key(four) == key(eight)
    before = weights_sha256(four)
    with torch.no_grad():
        for tensor in four.networks[0].live.values():
            tensor.add_(1)
    assert weights_sha256(four) == before


def test_another_object_in_the_place_of_a_live_tensor_is_no_frozen_weight() -> None:
    stage = make_stage(Scaled(rank=4), rank=RANK)
    before = weights_sha256(stage)
    module = stage.networks[0].module
    state = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items() if "lora_" in name}
    module.load_state_dict(state, strict=False, assign=True)
    assert weights_sha256(stage) == before


def test_frozen_weights_count_whichever_way_they_are_changed() -> None:
    stage = make_stage(Scaled(rank=4), rank=RANK)
    layer = stage.networks[0].module.layer.base_layer
    seen = [weights_sha256(stage)]
    with torch.no_grad():
        layer.weight[0, 0] += 1
    seen.append(weights_sha256(stage))
    layer.weight.data = 1.5 * layer.weight.data
    seen.append(weights_sha256(stage))
    layer.weight = nn.Parameter(layer.weight + 1)
    seen.append(weights_sha256(stage))
    assert len({*seen}) == len(seen)


def test_the_code_of_a_stage_is_that_of_its_parts_and_of_what_was_put_into_them() -> None:
    from frostline.models.wan.vae import use_onednn_conv3d

    module = nn.Sequential(Scaled(), nn.Conv3d(1, 1, 1))
    assert {__name__, "torch.nn.modules.conv"} <= stage_code(make_stage(module))
    assert "frostline.models.wan.vae" not in stage_code(make_stage(module))
    use_onednn_conv3d(module)
    assert "frostline.models.wan.vae" in stage_code(make_stage(module))


@pytest.mark.parametrize("verified_first", [True, False])
def test_of_several_engines_the_one_that_serves_best_is_found(
    store: EngineStore, manifest: Manifest, verified_first: bool
) -> None:
    stage = make_stage(Scaled())
    weights = weights_sha256(stage)
    from frostline.runtime.backends.base.options import BuildOptions

    for opset in (18, 20):
        options = BuildOptions(opset)
        own = EngineId("toy", "scaled", "onnxruntime", stage_key(stage, "onnxruntime", "fp32", weights, options))
        with store.building(own) as build:
            (build.folder / "model.onnx").write_bytes(b"")
            verified = (opset == 18) == verified_first
            build.commit(
                manifest.updated(**vars(own), weights_sha256=weights, opset=opset, verified=verified, device="cpu")
            )
    found = find_engine(store, stage, "onnxruntime", weights)
    assert found is not None
    assert found.manifest is not None
    assert found.manifest.opset == (18 if verified_first else 20)
    assert find_engine(store, stage, "onnxruntime", "0" * 64) is None
    assert find_engine(store, make_stage(Scaled(2.5)), "onnxruntime", weights) is None
