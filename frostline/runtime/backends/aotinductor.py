"""AOTInductor: torch's own compiler, ahead of time.

The compiled package holds code and no weights: it reads those of the module that the trainer has, where they lie, so
there is no second copy of the network, and an update in place is seen at the next call. The tensors of a LoRA are
inputs, as in every backend: one engine serves all ranks.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.models.precision import DTYPES
from frostline.runtime.device import device_name
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network, Runner

from .inputs import check_inputs, check_live
from .memory import engine_failure
from .options import BuildOptions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SOURCE: Literal["exported_program"] = "exported_program"
HOLDS_WEIGHTS = False
PRECISIONS = frozenset(DTYPES)
LARGEST_TENSOR: int | None = None

# How torch's allocators say that memory ran out, from where no Python exception comes through.
_NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "failed to map segment")
# The tracer's wrapper around `Network.module`.
_PREFIX = "module."
_SETTINGS = {
    # Folded constants would not follow an update of the weights that they came from.
    "aot_inductor.use_runtime_constant_folding": False,
    "aot_inductor.package_constants_in_so": False,
    # No channels last: at batch 1 torch's convolution answers in another layout than the compiler took for granted,
    # and the output was garbage.
    "layout_optimization": False,
}


def unavailable() -> str | None:
    """What is missing to compile: a C++ compiler, which no pip package brings."""
    if shutil.which(_compiler()) is None:
        return f"aotinductor needs the C++ compiler {_compiler()}: apt install g++, or name another one in CXX"
    return None


def _compiler() -> str:
    """What compiles and links a package.

    Not g++, which may link its own copy of libstdc++ into a package: beside torch's that ends in a crash on load.
    """
    return os.environ.get("CXX", "gcc")


def version() -> str:
    """Packages are bound to the version of torch that compiled them."""
    return torch.__version__


def target(device: torch.device, options: BuildOptions) -> str:
    """The device that the stage is on."""
    return device_name(device)


def obstacle(device: torch.device, target: str) -> str | None:
    """None: the target is part of an engine's key, and packages know of no other hindrance."""
    return None


def build(network: Network, source: ExportedProgram, folder: Path, options: BuildOptions) -> str:
    """Compile to `<network>.pt2`.

    Raises:
        EngineError: the compiler fails.
    """
    path, package = folder / f"{network.name}.pt2", io.BytesIO()
    settings = {**_SETTINGS, "cpp.cxx": (None, _compiler())}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(source, package_path=package, inductor_configs=settings)
    except Exception as error:
        raise EngineError(f"AOTInductor cannot compile {network.name}: {error}") from error
    # Not by torch's writer of packages, which ends the process where the disk is full.
    path.write_bytes(package.getbuffer())
    return path.name


def load(engine: VerifiedEngine, networks: Mapping[str, Network], device: torch.device) -> dict[str, Runner]:
    """One package for each network. Loading runs the package's code, hence only that of a verified engine."""
    return {
        entry.name: AOTInductorRunner(engine.read(entry.artifact), networks[entry.name])
        for entry in engine.manifest.networks
    }


class AOTInductorRunner:
    """Runs one package on the weights of `network.module`.

    Args:
        package: the content of a verified file.
        network: names of inputs and outputs, weights and live tensors.
    Raises:
        EngineError: the package cannot be loaded, or reads tensors that are no weights of the module.
    """

    def __init__(self, package: bytes, network: Network) -> None:
        check_live(network)
        self._network = network
        # One model in a package, and so one call at a time.
        self._lock = threading.Lock()
        weights = _weights(network.module)
        try:
            self._model = torch._inductor.aoti_load_package(io.BytesIO(package))
            wanted = self._model.get_constant_fqns()
            if strange := sorted(set(wanted) - weights.keys()):
                raise EngineError(f"it reads {strange[0]}, which is neither parameter nor buffer of the module")
            # The package keeps addresses only: whoever holds this runner keeps the tensors alive.
            self._constants = {name: weights[name] for name in wanted}
            self._model.load_constants(self._constants, check_full_update=True, user_managed=True)
        except (RuntimeError, EngineError) as error:
            raise engine_failure(f"AOTInductor cannot load {network.name}", error, _NO_MEMORY) from error

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the network; every output is freshly allocated."""
        check_inputs(self._network, inputs)
        positional = [inputs[spec.name].contiguous() for spec in self._network.inputs]
        live = [tensor.detach().contiguous() for tensor in self._network.live.values()]
        try:
            with self._lock:
                result = self._model(*positional, *live)
        except RuntimeError as error:
            raise engine_failure(f"AOTInductor failed on {self._network.name}", error, _NO_MEMORY) from error
        outputs = result if isinstance(result, tuple | list) else (result,)
        return dict(zip(self._network.outputs, outputs, strict=True))


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """By the names that the tracer gave them; a tensor with several names has an entry for each.

    Those that are not dense are copied: the package was compiled for dense ones.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {_PREFIX + name: tensor.detach().contiguous() for name, tensor in named}
