"""AOTInductor: torch's ahead-of-time compiler.

A compiled package contains code but no weights. It reads the weights of the trainer's module in place, so the network
is not duplicated, and the next call uses updated values. LoRA tensors are inputs, as in every backend: one engine
supports all ranks.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.models.quantization.linear import plain_layers
from frostline.runtime.engines.manifest import NetworkRecord
from frostline.runtime.engines.verification import VerifiedEngine
from frostline.runtime.stage import Network

from .base.backend import Backend
from .base.options import BuildOptions
from .base.runner import EngineRunner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# The tracer's wrapper around `Network.module`.
_PREFIX = "module."
_SETTINGS = {
    # Folded constants would be outdated after an update of the weights that they were computed from.
    "aot_inductor.use_runtime_constant_folding": False,
    "aot_inductor.package_constants_in_so": False,
    # Channels-last layout is off: at batch size 1, torch's convolution returned another layout than the compiler
    # assumed, and the output was wrong.
    "layout_optimization": False,
}


class AOTInductor(Backend):
    """Build packages with torch's compiler from exported programs."""

    source = "exported_program"
    holds_weights = False
    # A package only works with the torch version that compiled it.
    packages = ("torch",)
    install = "apt install g++, or set CXX to another compiler"

    def library(self) -> ModuleType:
        """Return torch."""
        return torch

    def unavailable(self) -> str | None:
        """Return the reason if there is no C++ compiler, which is not available as a pip package; otherwise None."""
        if shutil.which(_compiler()) is None:
            return f"{self.name} needs the C++ compiler {_compiler()}: {self.install}"
        return None

    def build(self, network: Network, source: ExportedProgram, folder: Path, options: BuildOptions) -> str:
        """Compile the network to `<network>.pt2`; return the name of the file.

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
        # torch's package writer is not used, because it ends the process if the disk is full.
        path.write_bytes(package.getbuffer())
        return path.name

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Load a package. This runs its code, so the engine must be verified."""
        return AOTInductorRunner(engine.read(entry.artifact), network)


class AOTInductorRunner(EngineRunner):
    """Run one package, which contains one model, with the weights of `network.module`.

    Args:
        package: the content of a verified file.
        network: names of inputs and outputs, weights and live tensors.
    Raises:
        EngineError: the package cannot be loaded, or reads tensors that are not weights of the module or are offloaded.
    """

    library_name = "AOTInductor"
    # Messages of torch's allocators when memory runs out; no Python exception is raised there.
    out_of_memory = ("out of memory", "can't allocate memory", "bad_alloc", "failed to map segment")

    def __init__(self, package: bytes, network: Network) -> None:
        super().__init__(network)
        with plain_layers(network.module):
            weights = _weights(network.module)
        with self._failures("cannot load"):
            self._model = torch._inductor.aoti_load_package(io.BytesIO(package))
            wanted = self._model.get_constant_fqns()
            if strange := sorted(set(wanted) - weights.keys()):
                raise LookupError(
                    f"the package reads {strange[0]}, which is neither a parameter nor a buffer of the module"
                )
            if away := next((name for name in wanted if weights[name].device != network.device), None):
                raise LookupError(f"the package reads {away}, which is kept in main memory (offload.blocks)")
            # The package only stores addresses: this runner has to keep the tensors alive.
            self._constants = {name: weights[name] for name in wanted}
            self._model.load_constants(self._constants, check_full_update=True, user_managed=True)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        positional = [inputs[spec.name].contiguous() for spec in self._network.inputs]
        live = [tensor.detach().contiguous() for tensor in self._network.live.values()]
        result = self._model(*positional, *live)
        outputs = result if isinstance(result, tuple | list) else (result,)
        return dict(zip(self._network.outputs, outputs, strict=True))


def _compiler() -> str:
    """Return the compiler and linker for packages.

    This is not g++, which may link its own copy of libstdc++ into a package; loading that next to torch's copy crashes.
    """
    return os.environ.get("CXX", "gcc")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights by their names in the traced program; a tensor with several names has several entries.

    Non-dense tensors are copied, because the package was compiled for dense ones.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {_PREFIX + name: tensor.detach().contiguous() for name, tensor in named}
