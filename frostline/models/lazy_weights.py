"""Weights of frozen parts that can be released while an engine replaces them, and read again from disk."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from frostline.errors import ConfigError
from frostline.models.quantization.linear import QuantisedLinear

log = logging.getLogger(__name__)

# Parts without a gradient, by the names of their stages; the high-noise expert has a gradient if it has a LoRA.
FROZEN_PARTS = ("text_encoder", "image_encoder", "vae_encoder", "denoiser_high_noise")

# Name prefixes of the VAE encoder's weights, which are in one file with the decoder's.
VAE_ENCODER = ("model.encoder.", "model.conv1.")


class PartWeights:
    """The parameters of one frozen part.

    While the weights are released, the parameters stay in their modules as the same objects, with their dtype and
    device, but empty: a network that uses them raises an error instead of returning wrong results.

    Args:
        parameters: the parameters, by the names that `read` uses.
        read: reads the tensors from the files, by name; may return others, too.
        files: the files of the tensors.
        nbytes: size of the weights in memory.
        identity: what else the weights depend on, such as the scale of an adapter that `read` merges.
        code: names of further modules whose code reads them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        read: Callable[[], Mapping[str, Tensor]],
        files: Sequence[Path],
        nbytes: int,
        identity: str = "",
        code: Sequence[str] = (),
    ) -> None:
        self.nbytes = nbytes
        self._parameters = dict(parameters)
        self._read = read
        self._files = tuple(files)
        self._identity = identity
        self._code = tuple(code)
        self.source = self._source()
        self._as_read = self._memory()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with copies of the parameters."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        if self.as_read:
            copied._as_read = copied._memory()
        return copied

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the names of the modules whose code reads the tensors."""
        return ((self._read.func if isinstance(self._read, partial) else self._read).__module__, *self._code)

    @property
    def resident(self) -> bool:
        """Return whether the weights are in memory."""
        return all(parameter.numel() > 0 for parameter in self._parameters.values())

    @property
    def as_read(self) -> bool:
        """Return whether the weights are in memory and neither changed nor moved since they were read."""
        return self.resident and self._memory() == self._as_read

    def release(self) -> None:
        """Release the memory, unless the weights were changed or moved: reading the files would not restore this."""
        if self.resident and not self.as_read:
            log.warning("the weights of %s were changed or moved in memory and are not released", self._files[0])
            return
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)

    def restore(self) -> None:
        """Read the weights again if they have been released.

        Raises:
            ConfigError: a file is missing or has changed.
        """
        if self.resident:
            return
        if self._source() != self.source:
            names = ", ".join(map(str, self._files))
            which = "it has" if len(self._files) == 1 else "one of them has"
            raise ConfigError(f"{names}: {which} changed since it was loaded: restart the program")
        tensors = self._read()
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]
        self._as_read = self._memory()

    def _memory(self) -> list[tuple[int, int]]:
        """Return address and version counter of each parameter."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters.values()]

    def _source(self) -> str:
        """Return an id of the files (paths, sizes, modification times), the dtypes of the weights, and `identity`."""
        stats = []
        for path in self._files:
            try:
                status = path.stat()
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            stats.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
        dtypes = sorted({str(parameter.dtype) for parameter in self._parameters.values()})
        return "\n".join([*stats, *dtypes, self._identity])


def empty_parameters(module: nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Replace each weight of `module` on the meta device by an empty parameter."""
    for part in module.modules():
        for name, parameter in [*part.named_parameters(recurse=False)]:
            if parameter.is_meta:
                # Codes and scales of a quantised layer keep their dtypes.
                own = parameter.dtype if isinstance(part, QuantisedLinear) and name != "bias" else dtype
                part._parameters[name] = nn.Parameter(torch.empty(0, dtype=own, device=device), requires_grad=False)
