"""AOTInductor: torch's own compiler, ahead of time.

The compiled package holds code and no weights: it reads those of the module that the trainer has, where they lie, so
there is no second copy of the network, and an update in place is seen at the next call. The tensors of a LoRA are
inputs, as in every backend: one engine serves all ranks.
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
    # Folded constants would not follow an update of the weights that they came from.
    "aot_inductor.use_runtime_constant_folding": False,
    "aot_inductor.package_constants_in_so": False,
    # No channels last: at batch 1 torch's convolution answers in another layout than the compiler took for granted,
    # and the output was garbage.
    "layout_optimization": False,
}


class AOTInductor(Backend):
    """Packages that torch's compiler makes of exported programs."""

    source = "exported_program"
    holds_weights = False
    # A package is bound to the version of torch that compiled it.
    packages = ("torch",)
    install = "apt install g++, or name another one in CXX"

    def library(self) -> ModuleType:
        """Return torch."""
        return torch

    def unavailable(self) -> str | None:
        """Return what is missing to compile: a C++ compiler, which no pip package brings."""
        if shutil.which(_compiler()) is None:
            return f"{self.name} needs the C++ compiler {_compiler()}: {self.install}"
        return None

    def build(self, network: Network, source: ExportedProgram, folder: Path, options: BuildOptions) -> str:
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

    def make_runner(
        self, engine: VerifiedEngine, entry: NetworkRecord, network: Network, device: torch.device
    ) -> EngineRunner:
        """Load a package, which runs its code: hence only that of a verified engine."""
        return AOTInductorRunner(engine.read(entry.artifact), network)


class AOTInductorRunner(EngineRunner):
    """Runs one package, which is one model, on the weights of `network.module`.

    Args:
        package: the content of a verified file.
        network: names of inputs and outputs, weights and live tensors.
    Raises:
        EngineError: the package cannot be loaded, or reads tensors that are no weights of the module.
    """

    library_name = "AOTInductor"
    # How torch's allocators say that memory ran out, from where no Python exception comes through.
    out_of_memory = ("out of memory", "can't allocate memory", "bad_alloc", "failed to map segment")

    def __init__(self, package: bytes, network: Network) -> None:
        super().__init__(network)
        with plain_layers(network.module):
            weights = _weights(network.module)
        with self._failures("cannot load"):
            self._model = torch._inductor.aoti_load_package(io.BytesIO(package))
            wanted = self._model.get_constant_fqns()
            if strange := sorted(set(wanted) - weights.keys()):
                raise LookupError(f"it reads {strange[0]}, which is neither parameter nor buffer of the module")
            # The package keeps addresses only: whoever holds this runner keeps the tensors alive.
            self._constants = {name: weights[name] for name in wanted}
            self._model.load_constants(self._constants, check_full_update=True, user_managed=True)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        positional = [inputs[spec.name].contiguous() for spec in self._network.inputs]
        live = [tensor.detach().contiguous() for tensor in self._network.live.values()]
        result = self._model(*positional, *live)
        outputs = result if isinstance(result, tuple | list) else (result,)
        return dict(zip(self._network.outputs, outputs, strict=True))


def _compiler() -> str:
    """Return what compiles and links a package.

    Not g++, which may link its own copy of libstdc++ into a package: beside torch's that ends in a crash on load.
    """
    return os.environ.get("CXX", "gcc")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """By the names that the tracer gave them; a tensor with several names has an entry for each.

    Those that are not dense are copied: the package was compiled for dense ones.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {_PREFIX + name: tensor.detach().contiguous() for name, tensor in named}
