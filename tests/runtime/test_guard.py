"""Engines use the current tensors of their stage's modules, or are not used: they are never outdated."""

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from frostline.errors import EngineError, EngineMemoryError, InputError
from frostline.export.exporter import export_stage
from frostline.runtime.backends.onnxruntime import OnnxRuntimeRunner
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.engines.tolerance import Tolerance
from frostline.runtime.guard import WeightGuard
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import ModuleTensors, Network, Stage, TensorSpec

ORT = "onnxruntime"


@pytest.fixture(autouse=True)
def signing_key(session_signing_key: Path) -> Path:
    """Use one key for all tests, because the engines are used by several tests."""
    return session_signing_key


class Scaled(nn.Module):
    """A network that computes `y = x W * gain`: W is frozen, the gain is live."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.linear = nn.Linear(32, 32, bias=False)
        self.linear.weight.requires_grad_(False).copy_(torch.randn(32, 32, generator=generator))
        self.gain = nn.Parameter(torch.rand(32, generator=generator) + 0.5)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.linear(x) * gain


def scaled_stage() -> Stage:
    module = Scaled()
    inputs = (TensorSpec("x", (Dimension("rows", 1, 4, 64), 32)),)
    live, specs = ModuleTensors(module, {"gain": "gain"}), (TensorSpec("gain", (32,)),)
    network = Network("scaled", module, inputs, ("y",), live, specs)
    return Stage(name="scaled", model="toy", networks=(network,), tolerance=Tolerance(1e-4, 1e-5, 0.9999))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> Path:
    root = tmp_path_factory.mktemp("engines")
    for backend in (ORT, "openvino"):
        export_stage(scaled_stage(), backend, EngineStore(root))
    return root


@pytest.fixture
def stage() -> Stage:
    return scaled_stage()


@pytest.fixture(params=[ORT, "openvino"])
def runtime(request: pytest.FixtureRequest, stage: Stage, engines: Path) -> Runtime:
    runtime = Runtime({"scaled": stage}, request.param, engines)
    assert served_by(runtime, rows()) == request.param
    return runtime


def module_of(stage: Stage) -> Scaled:
    module = stage.networks[0].module
    assert isinstance(module, Scaled)
    return module


def rows(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def served_by(runtime: Runtime, x: Tensor) -> str:
    """Return the backend that was used; check its outputs against PyTorch with the current tensors."""
    with runtime.clock.collect() as times:
        torch.testing.assert_close(runtime["scaled"](x=x)["y"], runtime.stages["scaled"].torch({"x": x})["y"])
    return times.read()["scaled"].backend


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("frostline")]


def assign_data(module: Scaled) -> None:
    module.linear.weight.data = 1.5 * module.linear.weight.data


def write_in_place(module: Scaled) -> None:
    with torch.no_grad():
        module.linear.weight.mul_(1.5)


def write_through_data(module: Scaled) -> None:
    """Change the weights like a merge of PEFT, which changes neither the address nor the version counter."""
    module.linear.weight.data += 0.5 * module.linear.weight.data


def assign_state(module: Scaled) -> None:
    module.load_state_dict({**module.state_dict(), "linear.weight": 1.5 * module.linear.weight}, assign=True)


def replace_parameter(module: Scaled) -> None:
    module.linear.weight = nn.Parameter(1.5 * module.linear.weight.detach(), requires_grad=False)


def replace_module(module: Scaled) -> None:
    weight, module.linear = module.linear.weight, nn.Linear(32, 32, bias=False)
    module.linear.weight.requires_grad_(False).copy_(1.5 * weight)


CHANGES = [assign_data, write_in_place, write_through_data, assign_state, replace_parameter, replace_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_frozen_weights_that_changed_are_not_computed_with(
    change: Callable[[Scaled], None], stage: Stage, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = module_of(stage), rows()
    before, fingerprint = module.linear.weight.detach().clone(), runtime.fingerprint("scaled")
    backend = runtime.plan["scaled"].backend
    change(module)
    assert [served_by(runtime, x) for _ in range(3)] == ["torch"] * 3
    (message,) = warnings(caplog)
    assert "stage scaled: its weights have changed since its engine was built" in message
    assert runtime.fingerprint("scaled") != fingerprint
    runtime.replan(backend)
    assert served_by(runtime, x) == "torch"
    with torch.no_grad():
        module.linear.weight.copy_(before)
    assert served_by(runtime, x) == backend
    assert runtime.fingerprint("scaled") == fingerprint


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_strict_raises_where_frozen_weights_changed(
    change: Callable[[Scaled], None], stage: Stage, engines: Path
) -> None:
    runtime = Runtime({"scaled": stage}, ORT, engines, strict=True)
    runtime["scaled"](x=rows())
    change(module_of(stage))
    with pytest.raises(EngineError, match="its weights have changed"):
        runtime["scaled"](x=rows())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_cached_by_a_fingerprint_follows_the_weights_without_engines(
    change: Callable[[Scaled], None], stage: Stage
) -> None:
    runtime = Runtime({"scaled": stage})
    fingerprint = runtime.fingerprint("scaled")
    assert runtime.fingerprint("scaled") == fingerprint
    change(module_of(stage))
    assert runtime.fingerprint("scaled") != fingerprint


def test_networks_that_were_handed_out_are_not_stale(stage: Stage, runtime: Runtime) -> None:
    backend, networks = runtime.networks_at("scaled", {"x": rows()})
    assert backend != "torch"
    assign_data(module_of(stage))
    torch.testing.assert_close(networks["scaled"](x=rows())["y"], stage.torch({"x": rows()})["y"])


def test_weights_that_moved_or_were_written_with_their_own_values_keep_the_engine(
    stage: Stage, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    weight, backend = module_of(stage).linear.weight, runtime.plan["scaled"].backend
    weight.data = weight.data.clone()
    assert served_by(runtime, rows()) == backend
    with torch.no_grad():
        weight.copy_(weight.clone())
    assert served_by(runtime, rows()) == backend
    assert warnings(caplog) == []


def test_a_live_tensor_that_was_replaced_is_followed(stage: Stage, runtime: Runtime) -> None:
    module, backend = module_of(stage), runtime.plan["scaled"].backend
    module.load_state_dict({**module.state_dict(), "gain": 2 * module.gain.detach()}, assign=True)
    assert served_by(runtime, rows()) == backend
    module.gain.data = 3 * module.gain.data
    assert served_by(runtime, rows()) == backend


def test_a_live_tensor_that_no_engine_takes_is_left_to_torch(
    stage: Stage, runtime: Runtime, engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, backend = module_of(stage), runtime.plan["scaled"].backend
    before, module.gain = module.gain, nn.Parameter(torch.full((1,), 2.0))
    assert [served_by(runtime, rows()) for _ in range(2)] == ["torch", "torch"]
    (message,) = warnings(caplog)
    assert "gain has shape (1,)" in message
    module.gain = before
    assert served_by(runtime, rows()) == backend
    module.gain = nn.Parameter(torch.full((1,), 2.0))
    with pytest.raises(EngineError, match=r"gain has shape \(1,\)"):
        Runtime({"scaled": stage}, backend, engines, strict=True)["scaled"](x=rows())


def test_a_live_tensor_that_became_a_function_of_others_is_left_to_torch(
    stage: Stage, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    module = module_of(stage)
    expected = module(rows(), module.gain)
    parametrize.register_parametrization(module, "gain", nn.Identity())
    # The gain is an input of the stage's network, which torch looks up, too.
    with pytest.raises(EngineError, match="the module no longer has the parameter gain"):
        runtime["scaled"](x=rows())
    parametrize.remove_parametrizations(module, "gain")
    torch.testing.assert_close(runtime["scaled"](x=rows())["y"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", [True, False])
def test_a_copy_owns_its_weights(engine: bool, stage: Stage, engines: Path) -> None:
    runtime = Runtime({"scaled": stage}, ORT if engine else "torch", engines)
    served_by(runtime, rows())
    copied = copy.deepcopy(runtime)
    kept = runtime["scaled"](x=rows())["y"]
    assert served_by(copied, rows()) == (ORT if engine else "torch")
    assert torch.equal(copied["scaled"](x=rows())["y"], kept)
    with torch.no_grad():
        module_of(stage).gain.mul_(2)
    write_in_place(module_of(stage))
    assert torch.equal(copied["scaled"](x=rows())["y"], kept), "the copy computes with the original's weights"
    own = copied.stages["scaled"]
    with torch.no_grad():
        module_of(own).gain.mul_(3)
    torch.testing.assert_close(copied["scaled"](x=rows())["y"], 3 * kept)
    served_by(runtime, rows())


def test_a_runtime_that_is_pickled_says_what_to_do(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match="save_adapter"):
        pickle.dumps(runtime)


@pytest.mark.parametrize("plan", [ORT, "openvino", "torch", "auto"])
def test_threads_share_a_runtime(plan: str, stage: Stage, engines: Path) -> None:
    runtime = Runtime({"scaled": stage}, plan, engines)
    inputs = [[rows(4 + 13 * index, seed) for seed in range(50)] for index in range(4)]
    expected = [[stage.torch({"x": x})["y"] for x in own] for own in inputs]
    wrong: list[str] = []
    done: list[int] = []

    def serve(index: int) -> None:
        for x, right in zip(inputs[index], expected[index], strict=True):
            y = runtime["scaled"](x=x)["y"]
            if y.shape != right.shape or not torch.allclose(y, right, atol=1e-4):
                wrong.append(f"{index}: {tuple(y.shape)}")
        done.append(index)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sorted(done), wrong) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"x": rows().double()}, RuntimeError, "dtype"),
        ({}, InputError, "lacks its input x"),
        ({"x": rows(), "z": rows()}, InputError, "has no input z"),
    ],
)
def test_one_wrong_call_does_not_cost_the_engine(
    inputs: dict[str, Tensor],
    error: type[Exception],
    message: str,
    runtime: Runtime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = runtime.plan["scaled"].backend
    with pytest.raises(error, match=message):
        runtime["scaled"](**inputs)
    assert served_by(runtime, rows()) == backend
    assert warnings(caplog) == []


def test_memory_that_ran_out_does_not_cost_the_engine(
    stage: Stage, engines: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime({"scaled": stage}, ORT, engines)

    def short_of_memory(self: OnnxRuntimeRunner, **inputs: Tensor) -> dict[str, Tensor]:
        raise EngineMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeRunner, "__call__", short_of_memory)
        served_by(runtime, rows())
        served_by(runtime, rows())
    (message,) = warnings(caplog)
    assert "ran out of memory, using torch for this call" in message
    assert runtime.plan["scaled"].backend == ORT


@pytest.mark.parametrize("name", ["base_layer", "beside"])
def test_a_layer_that_is_called_as_pefts_are_is_watched_whole(name: str) -> None:
    module = nn.ModuleDict({"base_layer": nn.Linear(3, 3), "beside": nn.Linear(3, 3)}).requires_grad_(False)
    network = Network("wrapped", module, (), ("y",))
    guard = WeightGuard(Stage(name="wrapped", model="toy", networks=(network,), tolerance=Tolerance(0, 0, 1)))
    assert guard.holds()
    module[name].weight.mul_(2)
    assert not guard.holds()


def test_the_guard_holds_nothing_alive_and_sees_what_comes_back(stage: Stage) -> None:
    """Keep addresses of tensors, but read this memory only if the tensor is still the same."""
    guard, weight = WeightGuard(stage), module_of(stage).linear.weight
    assert guard.holds()
    values = weight.data
    weight.data = torch.empty(0)
    assert not guard.holds()
    weight.data = values
    assert guard.holds()
