"""The `frostline adapter` commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import LoraScale, ModelFolder
from frostline.errors import ConfigError
from frostline.experts import ExpertName, Experts

app = typer.Typer(no_args_is_help=True, help="Convert a LoRA adapter for other programs, or merge it into the model.")

AdapterPath = Annotated[
    Path,
    typer.Argument(
        help="PEFT folder or LoRA .safetensors file; for two experts, a folder with high_noise and low_noise."
    ),
]
ExpertOption = Annotated[
    Experts | None,
    typer.Option(
        "--expert",
        help="Experts that the adapter is for: low, high or both. Default: both if the folder "
        "contains both, otherwise low.",
    ),
]
WeightsType = Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or bf16; unchanged if not given.")]


@app.command()
def convert(
    adapter: AdapterPath,
    out: Annotated[
        Path, typer.Option("--out", help="Output .safetensors file; a folder for the peft format and for two experts.")
    ],
    to: Annotated[str, typer.Option("--to", help="Output format: peft, diffsynth, comfyui, diffusers or musubi.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model that the adapter is for, to check layer names; any Wan model if not given."),
    ] = None,
    expert: ExpertOption = None,
    precision: WeightsType = None,
) -> None:
    """Convert an adapter to the format of another program.

    The adapters of two experts are written to a folder as high_noise and low_noise.
    """
    from frostline.models.lora import part_path, read_adapters, write_adapter
    from frostline.models.precision import parse_precision
    from frostline.stages.families import check_adapters, default_family, family_of

    family = default_family() if model is None else family_of(model)
    adapters = read_adapters(adapter, family.layer_path, expert)
    if model is not None:
        check_adapters(model, adapters)
    dtype = None if precision is None else parse_precision(precision)
    for each, found in adapters.items():
        place = out if len(adapters) == 1 else part_path(out, each, to)
        write_adapter(found, to, place, dtype, layer_path=family.layer_path, in_diffusers=family.diffusers_path)
        typer.echo(f"wrote {place}")


@app.command()
def merge(
    model: ModelFolder,
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="Output .safetensors file; a folder for both experts.")],
    expert: ExpertOption = None,
    lora_scale: LoraScale = 1.0,
    precision: WeightsType = None,
) -> None:
    """Merge an adapter into the denoiser (one or both experts), and write it with the official tensor names.

    Both experts are written to high_noise_model/ and low_noise_model/, as in the official checkpoints. A model with
    8-bit weights is written in the precision of its other weights, unless --precision is given.
    """
    from frostline.models.lora import check_weights_file, merged_path, read_adapters, write_weights
    from frostline.models.precision import parse_precision
    from frostline.stages.families import check_adapters, family_of

    if not math.isfinite(lora_scale):
        raise ConfigError(f"--lora-scale {lora_scale}: must be a finite number")
    family, dtype = family_of(model), None if precision is None else parse_precision(precision)
    adapters = read_adapters(adapter, family.layer_path, expert)
    places: dict[ExpertName, Path] = {each: out if len(adapters) == 1 else merged_path(out, each) for each in adapters}
    for place in places.values():
        check_weights_file(place)
    check_adapters(model, adapters)
    for each, place in places.items():
        write_weights(family.merge_adapter(model, adapters[each], each, lora_scale, dtype), place)
        typer.echo(f"wrote {place}")
