"""Trace a network to an ONNX file."""

from __future__ import annotations

from pathlib import Path

import torch

from frostline.errors import EngineError
from frostline.export.islands import widen_sensitive
from frostline.export.program import quiet, trace_program
from frostline.runtime.backends.options import OPSET
from frostline.runtime.stage import Network

# Larger weights than this cannot be inside the protobuf: they go to `<file>.data`.
_EMBEDDED_BYTES = 1_500_000_000


def trace_onnx(network: Network, path: Path, opset: int = OPSET) -> None:
    """Write `network` to `path`, its open dimensions dynamic, its live tensors as inputs.

    Raises:
        EngineError: the exporter cannot express the network.
    """
    program = trace_program(network)
    weights = sum(tensor.nbytes for tensor in network.module.state_dict().values())
    try:
        with quiet(), torch.no_grad():
            translated = torch.onnx.export(
                program,
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in (*network.inputs, *network.live_specs)],
                output_names=list(network.outputs),
            )
            assert translated is not None
            widen_sensitive(translated.model)
            translated.save(path, external_data=weights > _EMBEDDED_BYTES)
    except OSError:
        raise
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be expressed in ONNX: {error}") from error
