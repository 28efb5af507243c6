"""`frostline adapter …`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import LoraScale, WanModel
from frostline.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Convert a LoRA adapter for other programs, or merge it.")

AdapterPath = Annotated[Path, typer.Argument(help="A PEFT folder, or a LoRA .safetensors file.")]
WeightsType = Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or bf16; as they are if not given.")]


@app.command()
def convert(
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file, or for peft a folder.")],
    to: Annotated[str, typer.Option("--to", help="peft, diffsynth, comfyui or diffusers.")],
    precision: WeightsType = None,
) -> None:
    """Write an adapter under the names that another program reads."""
    from frostline.models.adapters import read_adapter, write_adapter
    from frostline.models.precision import parse_precision

    write_adapter(read_adapter(adapter), to, out, None if precision is None else parse_precision(precision))
    typer.echo(f"wrote {out}")


@app.command()
def merge(
    model: WanModel,
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file.")],
    lora_scale: LoraScale = 1.0,
    precision: WeightsType = None,
) -> None:
    """Write the denoiser (of two experts the low-noise one) with the adapter in its weights, under Wan's own names."""
    from frostline.models.adapters import check_weights_file, merge_adapter, read_adapter, write_weights
    from frostline.models.files import find_files
    from frostline.models.precision import parse_precision

    if not math.isfinite(lora_scale):
        raise ConfigError(f"--lora-scale {lora_scale}: must be a number")
    check_weights_file(out)
    found, dtype = read_adapter(adapter), None if precision is None else parse_precision(precision)
    tensors = find_files(model).denoiser.read(None, "cpu")  # as stored: safetensors are mapped, not copied
    write_weights(merge_adapter(tensors, found, lora_scale, dtype), out)
    typer.echo(f"wrote {out}")
