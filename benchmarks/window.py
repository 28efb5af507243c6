"""Count operations and memory of the VAE decoder by the number of latent frames with gradient (the window).

    python benchmarks/window.py --model Wan2.2-I2V-A14B --video 1x81x3x480x480 --windows 21,7,1

No weights are needed, because the tensors have no data. Operations are counted with `torch.utils.flop_counter` (a
multiply-add is two), bytes with the memory plan. The window is at the end of the clip, so the number of frames that are
decoded before it without gradient is the largest; the average over all positions is about half of it. Nothing is
recomputed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, write_result
from rich.console import Console
from rich.table import Table
from shapes import DTYPES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from frostline.config import LoraSettings
from frostline.models.video_shape import VideoShape
from frostline.stages.families import family_of
from frostline.train.memory.memory_profile import measure_live_stages, without_data


def main() -> None:
    """Count, print a table and write JSON."""
    arguments = _arguments()
    family = family_of(arguments.model)
    model = family.empty_model(family.read_spec(arguments.model), DTYPES[arguments.precision], LoraSettings())
    batch, frames, _, height, width = (int(extent) for extent in arguments.video.split("x"))
    shape = VideoShape(batch, frames, height, width)
    decoder, rows = model.decoder(), {}
    for window in (int(count) for count in arguments.windows.split(",")):
        with without_data(*model.modules()):
            latents = model.denoiser_sample(shape)["latents"].to(decoder.dtype)
            rows[window] = _operations(decoder, latents, window)
        footprint = measure_live_stages(model, shape, "none", window)[decoder.stage]
        rows[window] |= {
            "kept_bytes": footprint.kept,
            "peak_bytes": max(footprint.forward_peak, footprint.backward_peak),
        }
    write_result(arguments.out, {"model": arguments.model, "video": arguments.video, "windows": rows})
    table = Table("latent frames", title=f"VAE decoder of {arguments.model} at {arguments.video}")
    for column in ("before it, TFLOP", "live, TFLOP", "relative to all frames", "kept, GB", "peak, GB"):
        table.add_column(column, justify="right")
    whole = max(row["live_flop"] for row in rows.values())
    for window, row in rows.items():
        share = (row["before_flop"] + row["live_flop"]) / whole
        figures = (row["before_flop"] / 1e12, row["live_flop"] / 1e12, share, row["kept_bytes"] / 1e9)
        table.add_row(str(window), *(f"{value:.2f}" for value in figures), f"{row['peak_bytes'] / 1e9:.2f}")
    Console(width=120).print(table)


def _operations(decoder: Any, latents: Tensor, window: int) -> dict[str, int]:
    first = latents.shape[2] - window
    before, live = FlopCounterMode(display=False), FlopCounterMode(display=False)
    caches = None
    if first:
        with torch.no_grad(), before:
            caches = decoder.caches(decoder.networks, latents[:, :, :first])
    part = latents[:, :, first:].detach().requires_grad_()
    with live:
        video = decoder.whole(part) if caches is None else decoder.go_on(part, caches)
        video.float().sum().backward()
    return {"before_flop": before.get_total_flops(), "live_flop": live.get_total_flops()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan2.2-I2V-A14B", help="a release, or the folder of a checkpoint")
    parser.add_argument("--video", default="1x81x3x480x480", help="batch x frames x 3 x height x width")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--windows", default="21,7,1", help="latent frames with gradient, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS / "window.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
