"""Traces of networks, each created once for all backends: tracing takes seconds to minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from frostline.runtime.stage import Network, Stage

# The tracer takes seconds to import, and commands that only look up engines do not need it.
if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram


class Traces:
    """The graphs of one stage's networks, each created at first use. They share the weights of the networks."""

    def __init__(self) -> None:
        self._programs: dict[str, ExportedProgram] = {}
        self._translated: dict[tuple[str, int], ONNXProgram] = {}

    def program(self, network: Network) -> ExportedProgram:
        """See `trace_program`."""
        from frostline.export.tracing.torch_export import trace_program

        if network.name not in self._programs:
            self._programs[network.name] = trace_program(network)
        return self._programs[network.name]

    def onnx(self, network: Network, opset: int) -> ONNXProgram:
        """See `translate`."""
        from frostline.export.tracing.onnx import translate

        key = network.name, opset
        if key not in self._translated:
            self._translated[key] = translate(network, self.program(network), opset)
        return self._translated[key]

    def save_onnx(self, stage: Stage, network: Network, opset: int, path: Path) -> None:
        """Write `network` of `stage` to `path` with a description; see `frostline.export.tracing.onnx.save_onnx`."""
        from frostline.export.tracing.onnx import save_onnx
        from frostline.export.tracing.onnx_annotations import describe

        translated = self.onnx(network, opset)
        describe(translated.model, stage, network)
        save_onnx(network, translated, path)
