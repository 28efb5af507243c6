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
    model: Annotated[str | None, typer.Option(help="The model it is for, to check its layers against.")] = None,
    precision: WeightsType = None,
) -> None:
    """Write an adapter in the format that another program reads."""
    from frostline.models.checkpoints.checkpoint_files import find_files
    from frostline.models.lora import check_fits, read_adapter, write_adapter
    from frostline.models.precision import parse_precision

    found = read_adapter(adapter)
    if model is not None:
        check_fits(found, find_files(model).denoiser.shapes)
    write_adapter(found, to, out, None if precision is None else parse_precision(precision))
    typer.echo(f"wrote {out}")


@app.command()
def merge(
    model: WanModel,
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file.")],
    lora_scale: LoraScale = 1.0,
    precision: WeightsType = None,
) -> None:
    """Write the denoiser (of two experts the low-noise one) with the adapter in its weights, under Wan's own names.

    Weights of 8 bits become the type of the others, unless a precision is given.
    """
    from frostline.models.checkpoints.checkpoint_files import find_files
    from frostline.models.lora import check_fits, check_weights_file, merge_adapter, read_adapter, write_weights
    from frostline.models.precision import parse_precision

    if not math.isfinite(lora_scale):
        raise ConfigError(f"--lora-scale {lora_scale}: must be a number")
    check_weights_file(out)
    found, dtype = read_adapter(adapter), None if precision is None else parse_precision(precision)
    denoiser = find_files(model).denoiser
    check_fits(found, denoiser.shapes)
    write_weights(merge_adapter(denoiser.read_exact(), found, lora_scale, dtype or denoiser.compute_dtype), out)
    typer.echo(f"wrote {out}")
