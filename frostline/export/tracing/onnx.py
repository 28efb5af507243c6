"""Trace a network to an ONNX file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from frostline.errors import EngineError
from frostline.export.tracing.onnx_annotations import name_axes, strip_origin
from frostline.export.tracing.onnx_shortcuts import decomposed_where_needed, shortcuts
from frostline.export.tracing.precision_overrides import widen_sensitive
from frostline.export.tracing.torch_export import WITHOUT_FAKE_CACHE, quiet, trace_program
from frostline.models.quantization.linear import dequantised_bytes
from frostline.runtime.backends.base.options import OPSET
from frostline.runtime.stage import Network

# Larger weights do not fit into the protobuf and go to `<file>.data`.
_EMBEDDED_BYTES = 1_500_000_000


def trace_onnx(network: Network, path: Path, opset: int = OPSET) -> None:
    """Write `network` to `path`, with dynamic dimensions, and live tensors as inputs.

    Raises:
        EngineError: the exporter does not support an operation of the network.
    """
    save_onnx(network, translate(network, trace_program(network), opset), path)


def translate(network: Network, program: ExportedProgram, opset: int) -> ONNXProgram:
    """Translate a program of `trace_program` to ONNX. The result shares the weights of the network.

    Raises:
        EngineError: the exporter does not support an operation of the network.
    """
    try:
        with quiet(), torch.no_grad(), WITHOUT_FAKE_CACHE(), shortcuts():
            translated = torch.onnx.export(
                decomposed_where_needed(program, opset),
                verbose=False,
                opset_version=opset,
                input_names=[spec.name for spec in (*network.inputs, *network.live_specs)],
                output_names=list(network.outputs),
            )
            assert translated is not None
            widen_sensitive(translated.model)
            name_axes(translated.model, network)
            strip_origin(translated.model)
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be expressed in ONNX: {error}") from error
    return translated


def save_onnx(network: Network, translated: ONNXProgram, path: Path) -> None:
    """Write the result of `translate`; large weights go to one separate file.

    Raises:
        EngineError: the exporter cannot write it.
        OSError: the file cannot be written.
    """
    sizes = {id(parameter): size for parameter, size in dequantised_bytes(network.module)}
    tensors = [*network.module.parameters(), *network.module.buffers()]
    weights = sum(sizes.get(id(tensor), _nbytes(tensor)) for tensor in tensors)
    try:
        with quiet(), torch.no_grad():
            translated.save(path, external_data=weights > _EMBEDDED_BYTES)
    except OSError:
        raise
    except Exception as error:
        raise EngineError(f"network {network.name} cannot be written as ONNX: {error}") from error


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
