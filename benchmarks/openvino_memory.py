"""Measure how much the memory of a process grows while OpenVINO runs a face detector at many shapes.

    python benchmarks/openvino_memory.py --shapes 3000

Runs P-Net, the first network of MTCNN, at random shapes, with the number of cached kernels that frostline sets, and
with OpenVINO's default. Each runs in a separate process, because freed memory is seldom returned to the system.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from frostline.export.tracing.onnx import trace_onnx
from frostline.models.faces.detectors import load_detector
from frostline.rewards.face_identity.detector import build
from frostline.runtime.backends import openvino
from frostline.stages.shapes import ShapeRange

_DEFAULT = 5000


def main() -> None:
    """Print MiB and seconds for each number of kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=3000)
    parser.add_argument("--kernels", type=int, help="measure only this number of kernels, in this process")
    arguments = parser.parse_args()
    if arguments.kernels is not None:
        print(_measure(arguments.shapes, arguments.kernels))
        return
    for kernels in (openvino._CACHED_KERNELS, _DEFAULT):
        command = [sys.executable, __file__, "--shapes", str(arguments.shapes), "--kernels", str(kernels)]
        subprocess.run(command, check=True)


def _measure(shapes: int, kernels: int) -> str:
    openvino._CACHED_KERNELS = kernels
    torch.set_num_threads(1)
    network = build(load_detector("mtcnn"), ShapeRange()).networks[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pnet.onnx"
        trace_onnx(network, path)
        runner = openvino.OpenVinoRunner(path, network)
    process, draw = psutil.Process(), random.Random(0)
    before, start = 0, time.perf_counter()
    for index in range(-50, shapes):
        if index == 0:
            before, start = process.memory_info().rss, time.perf_counter()
        runner(images=torch.rand(1, 3, draw.randint(12, 128), draw.randint(12, 128)))
    growth = (process.memory_info().rss - before) / 2**20
    return f"{kernels} kernels: {growth:.0f} MiB and {time.perf_counter() - start:.0f} s over {shapes} shapes"


if __name__ == "__main__":
    main()
