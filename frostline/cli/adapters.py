"""`frostline adapter …`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import LoraScale, ModelFolder
from frostline.errors import ConfigError
from frostline.experts import ExpertName, Experts

app = typer.Typer(no_args_is_help=True, help="Convert a LoRA adapter for other programs, or merge it.")

AdapterPath = Annotated[
    Path,
    typer.Argument(
        help="A PEFT folder or a LoRA .safetensors file; for two experts a folder with such a high_noise and low_noise."
    ),
]
ExpertOption = Annotated[
    Experts | None,
    typer.Option(
        "--expert",
        help="Of two experts, whose adapter it is: low, high or both; by default both of a folder that has both, else "
        "low.",
    ),
]
WeightsType = Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or bf16; as they are if not given.")]


@app.command()
def convert(
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file; a folder for peft, and for two experts.")],
    to: Annotated[str, typer.Option("--to", help="peft, diffsynth, comfyui, diffusers or musubi.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model that the adapter is for, to check its layers; a Wan model if left out."),
    ] = None,
    expert: ExpertOption = None,
    precision: WeightsType = None,
) -> None:
    """Write an adapter in the format that another program reads.

    Those of two experts become high_noise and low_noise in a folder.
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
    out: Annotated[Path, typer.Option("--out", help="A .safetensors file; for both experts a folder.")],
    expert: ExpertOption = None,
    lora_scale: LoraScale = 1.0,
    precision: WeightsType = None,
) -> None:
    """Write the denoiser, or one or both of two experts, with the adapter merged, under the official tensor names.

    Both are written as a release has them: high_noise_model/ and low_noise_model/ in the folder. Weights of 8 bits
    become the type of the others, unless a precision is given.
    """
    from frostline.models.lora import check_weights_file, merged_path, read_adapters, write_weights
    from frostline.models.precision import parse_precision
    from frostline.stages.families import check_adapters, family_of

    if not math.isfinite(lora_scale):
        raise ConfigError(f"--lora-scale {lora_scale}: must be a number")
    family, dtype = family_of(model), None if precision is None else parse_precision(precision)
    adapters = read_adapters(adapter, family.layer_path, expert)
    places: dict[ExpertName, Path] = {each: out if len(adapters) == 1 else merged_path(out, each) for each in adapters}
    for place in places.values():
        check_weights_file(place)
    check_adapters(model, adapters)
    for each, place in places.items():
        write_weights(family.merge_adapter(model, adapters[each], each, lora_scale, dtype), place)
        typer.echo(f"wrote {place}")
