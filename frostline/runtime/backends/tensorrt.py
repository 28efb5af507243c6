"""TensorRT and TensorRT-RTX: one builder and one runner for two modules with the same API.

Networks are strongly typed: the types in the ONNX graph are those of the engine. TensorRT-RTX builds for a named
compute capability on any machine, TensorRT for the GPU that it finds. Running takes an NVIDIA driver; from the second
call of a shape on it is the replay of a CUDA graph.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from frostline.errors import EngineError
from frostline.models.precision import DTYPES
from frostline.runtime.device import compute_capabilities, device_name, sm_name
from frostline.runtime.stage import Network, Runner
from frostline.runtime.verification import VerifiedEngine
from frostline.writing import written_whole

from .cuda_graphs import CudaGraphs
from .inputs import check_inputs, check_live
from .options import BuildOptions, BuildProgress

log = logging.getLogger(__name__)

# What TensorRT-RTX builds for where no GPU says otherwise: Ada and Blackwell.
_USUAL_CAPABILITIES = ("8.9", "12.0")
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorRTBackend:
    """The furniture of `Backend` for one of the two modules.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        extra: the extra of frostline that installs it.
        cross_builds: whether it builds for GPUs that this machine lacks.
    """

    SOURCE: Literal["onnx"] = "onnx"
    HOLDS_WEIGHTS = True
    PRECISIONS = frozenset(DTYPES)

    def __init__(self, module: str, extra: str, cross_builds: bool) -> None:
        self._module = module
        self._extra = extra
        self._cross_builds = cross_builds

    def unavailable(self) -> str | None:
        """Why the module cannot be used, or None."""
        try:
            self._import()
        except (ImportError, OSError, RuntimeError) as error:
            return f"{self._module} cannot be imported ({error}): pip install 'frostline[{self._extra}]'"
        return None

    def version(self) -> str:
        """The installed version."""
        return self._import().__version__

    def target(self, device: torch.device, options: BuildOptions) -> str:
        """The GPUs asked for, else this machine's, else the usual ones.

        Raises:
            EngineError: a GPU of this machine is wanted, and there is none.
        """
        wanted = options.compute_capabilities
        if not wanted and self._cross_builds and not torch.cuda.is_available():
            wanted = _USUAL_CAPABILITIES
        return "+".join(dict.fromkeys(map(self._sm_name, wanted or ("current",))))

    def _sm_name(self, capability: str) -> str:
        if capability != "current":
            return sm_name(capability)
        if not torch.cuda.is_available():
            advice = (
                ": name a compute capability, such as 8.9" if self._cross_builds else ", and it builds for no other"
            )
            raise EngineError(f"{self._module} finds no NVIDIA GPU here{advice}")
        return device_name(torch.device("cuda", torch.cuda.current_device()))

    def obstacle(self, device: torch.device, target: str) -> str | None:
        """Why an engine for `target` cannot run on `device`, or None."""
        if not torch.cuda.is_available():
            return "no NVIDIA driver"
        if device.type != "cuda":
            return f"the model is on the {device.type}, and TensorRT runs on GPUs"
        if device_name(device) not in target.split("+"):
            return f"it is built for {target}, and this GPU is {device_name(device)}"
        return None

    def build(self, network: Network, source: Path, folder: Path, options: BuildOptions) -> str:
        """Compile the ONNX file to `<network>.plan`.

        Raises:
            EngineError: TensorRT cannot parse or compile it; the message holds TensorRT's own.
        """
        trt = self._import()
        logger = _new_logger(trt)
        builder = trt.Builder(logger)
        graph = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, graph, source, logger)
        config = builder.create_builder_config()
        # TF32 has 10 bits of mantissa: no fp32 engine would be equal to PyTorch.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        target = self.target(network.device, options)
        self._set_target(trt, config, target)
        _add_profile(builder, graph, config, network)
        monitor = _new_monitor(trt, options.progress)
        config.progress_monitor = monitor
        # TensorRT-RTX measures when it loads an engine, and keeps no timing cache.
        timing_cache = None if self._cross_builds else options.timing_cache
        _read_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(graph, config)
        if monitor.error is not None:
            raise monitor.error
        if plan is None:
            raise EngineError(f"{self._module} cannot build {network.name}: {_last_words(logger)}")
        _write_timing_cache(config, timing_cache)
        name = f"{network.name}.plan"
        (folder / name).write_bytes(plan)
        if self.obstacle(torch.device("cuda"), target) is None:
            table = _layer_table(trt, plan)
            (folder / f"{network.name}.layers.json").write_text(json.dumps(table, indent=1))
        return name

    def _set_target(self, trt: Any, config: Any, target: str) -> None:
        names = target.split("+")
        if not self._cross_builds:
            if names != [self._sm_name("current")]:
                raise EngineError(
                    f"{self._module} builds only for the GPU of this machine, not for {target}: use tensorrt-rtx"
                )
            return
        known = trt.ComputeCapability.__members__
        capabilities = [known.get(name.upper().replace("_", "")) for name in names]
        if None in capabilities:
            offered = ", ".join(name for name in known if name.startswith("SM"))
            raise EngineError(f"{self._module} {trt.__version__} does not build for {target}, only for {offered}")
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)

    def load(self, engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
        """One execution context for each network.

        Raises:
            EngineError: it cannot run here, or TensorRT refuses it.
        """
        manifest = engine.manifest
        if reason := self.obstacle(device, manifest.device):
            built_for = ", ".join(compute_capabilities(manifest.device))
            raise EngineError(
                f"the {manifest.backend} engine of {manifest.stage} (compute capability {built_for}) is built, "
                f"not verified here: {reason}"
            )
        trt = self._import()
        return {
            entry.name: TensorRTRunner(trt, engine.read(entry.artifact), networks[entry.name], device)
            for entry in manifest.networks
        }

    def _import(self) -> ModuleType:
        return importlib.import_module(self._module)


class TensorRTRunner:
    """Runs one engine on torch's current stream, in memory that torch allocates.

    Args:
        trt: the module, `tensorrt` or `tensorrt_rtx`.
        plan: the engine, as read from a `VerifiedEngine`.
        network: names of inputs and outputs, and the live tensors.
        device: the GPU that the tensors are on.
    Raises:
        EngineError: TensorRT refuses the engine.
    """

    def __init__(self, trt: Any, plan: bytes, network: Network, device: torch.device) -> None:
        check_live(network)
        self._network = network
        self._device = device
        self._logger = _new_logger(trt)
        # Its `engine_host_code_allowed` stays off: a plan is data, and no code of its own may run.
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise EngineError(f"TensorRT cannot load {network.name}: {_last_words(self._logger)}")
            self._context = _new_context(trt, self._engine)
        if self._context is None:
            raise EngineError(f"TensorRT cannot prepare {network.name}: {_last_words(self._logger)}")
        self._graphs = CudaGraphs(self._launch)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the network; outputs are freshly allocated, and ready on torch's current stream."""
        check_inputs(self._network, inputs)
        live = self._network.live.values()
        with torch.cuda.device(self._device):
            if not all(tensor.is_contiguous() for tensor in live):
                # Such a tensor is copied at each launch, and a recording would keep one copy for good.
                return self._launch(inputs)
            return self._graphs(inputs, depends=tuple(tensor.data_ptr() for tensor in live))

    def _launch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Whatever is copied must live until the launch; afterwards the stream's order protects it.
        kept = [self._bind_input(name, tensor) for name, tensor in {**inputs, **self._network.live}.items()]
        if missing := self._context.infer_shapes():
            raise EngineError(f"{self._network.name} lacks its input {missing[0]}")
        kept.append(self._bind_scratch())
        outputs = {name: self._bind_output(name) for name in self._network.outputs}
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise EngineError(f"TensorRT failed on {self._network.name}: {_last_words(self._logger)}")
        return outputs

    def _bind_input(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(self._device).contiguous()
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise EngineError(
                f"{self._network.name}: input {name} of shape {tuple(tensor.shape)} is refused: "
                f"{_last_words(self._logger)}"
            )
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _bind_scratch(self) -> Tensor:
        size = self._context.update_device_memory_size_for_shapes()
        scratch = torch.empty(max(1, size), dtype=torch.uint8, device=self._device)
        self._context.set_device_memory(scratch.data_ptr(), size)
        return scratch

    def _bind_output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(extent < 0 for extent in shape):
            raise EngineError(f"{self._network.name}: the shape of output {name} depends on data: {shape}")
        dtype = _DTYPES[self._engine.get_tensor_dtype(name).name]
        output = torch.empty(shape, dtype=dtype, device=self._device)
        self._context.set_tensor_address(name, output.data_ptr())
        return output


def _new_context(trt: Any, engine: Any) -> Any:
    """An execution context in memory that torch allocates at each launch.

    Else TensorRT would reserve, for good, what the largest shapes of the profile need.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if specialization is None:
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # TensorRT-RTX compiles kernels for new shapes in the background; a CUDA graph would keep the slow ones for good.
    config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
    return engine.create_execution_context(config)


def _parse(trt: Any, graph: Any, source: Path, logger: Any) -> None:
    parser = trt.OnnxParser(graph, logger)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        found = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip() for error in errors)
        raise EngineError(f"{trt.__name__} cannot parse {source.stem}: {found or _last_words(logger)}")
    for index in range(graph.num_layers):
        layer = graph.get_layer(index)
        if layer.type.name == "ATTENTION_OUTPUT":
            # Opset 23 only: no fused kernel takes fp32 with dynamic shapes.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _add_profile(builder: Any, graph: Any, config: Any, network: Network) -> None:
    specs = {spec.name: spec for spec in (*network.inputs, *network.live_specs)}
    profile = builder.create_optimization_profile()
    for index in range(graph.num_inputs):
        entry = graph.get_input(index)
        if -1 in tuple(entry.shape):
            spec = specs[entry.name]
            profile.set_shape(entry.name, spec.shape_at("min"), spec.shape_at("opt"), spec.shape_at("max"))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses the shapes of {network.name}")


def _read_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            log.warning("the timing cache %s is of another GPU or version: it is left unused", path)


def _write_timing_cache(config: Any, path: Path | None) -> None:
    cache = config.get_timing_cache() if path is not None else None
    if path is not None and cache is not None:
        with written_whole(path) as part:
            part.write_bytes(cache.serialize())


def _layer_table(trt: Any, plan: Any) -> Any:
    """What the engine inspector says of every layer."""
    logger = _new_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"TensorRT cannot load what it built: {_last_words(logger)}")
    return json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _new_logger(trt: Any) -> Any:
    """TensorRT's messages into ours; the latest errors and warnings are kept to explain a failure."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.latest: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                self.latest.append(message)
            log.debug("%s: %s", severity.name, message)

    return Logger()


def _last_words(logger: Any) -> str:
    return "; ".join(logger.latest) or "it does not say why"


def _new_monitor(trt: Any, progress: BuildProgress | None) -> Any:
    """Passes TensorRT's progress on. An exception in there, Ctrl-C among them, ends the build and is kept.

    It must not leave the callback: TensorRT's threads would take the process down with them.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if progress is not None and self.error is None:
                    progress(phase, step + 1, self._steps.get(phase, 0))
            except BaseException as error:
                self.error = error
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


TENSORRT = TensorRTBackend("tensorrt", extra="tensorrt", cross_builds=False)
TENSORRT_RTX = TensorRTBackend("tensorrt_rtx", extra="tensorrt-rtx", cross_builds=True)
