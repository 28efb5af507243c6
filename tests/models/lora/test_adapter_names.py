"""Layer names in the adapters of every program: each is a layer of Wan's denoiser, or is refused."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import make_adapter, place, same_update, tiny_denoiser, uneven, write_flat
from diffsynth.models.wan_video_dit import WanModel
from safetensors.torch import load_file, save_file
from small_wan import DENOISER
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.checkpoints.formats import names
from frostline.models.checkpoints.formats.convert import to_diffusers
from frostline.models.lora import FORMATS, Adapter, read_adapter, write_adapter
from frostline.models.lora.names import denoiser_path


def kohya(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


def of_diffusers(layer: str) -> str:
    return names.rename([layer], names.DENOISER, to_diffusers=True)[layer]


# By program: its name of a layer, its names of A and B, and whether it writes alpha.
PROGRAMS: dict[str, tuple[Callable[[str], str], tuple[str, str], bool]] = {
    "musubi-tuner": (kohya("lora_unet_"), ("lora_down", "lora_up"), True),
    "VideoX-Fun": (kohya("lora_unet__"), ("lora_down", "lora_up"), True),
    "kohya with diffusers' names": (
        lambda n: kohya("lora_transformer_")(of_diffusers(n)),
        ("lora_down", "lora_up"),
        True,
    ),
    "DiffSynth in a pipeline": ("pipe.dit.{}".format, ("lora_A.default", "lora_B.default"), False),
    "its second expert": ("pipe.dit2.{}".format, ("lora_A.default", "lora_B.default"), False),
    "ComfyUI": ("diffusion_model.{}".format, ("lora_down", "lora_up"), True),
    "ComfyUI in a checkpoint": ("model.diffusion_model.{}".format, ("lora_down", "lora_up"), True),
    "diffusers' second expert": (lambda n: f"transformer_2.{of_diffusers(n)}", ("lora_A", "lora_B"), False),
    "diffusers with Wan's names": ("transformer.{}".format, ("lora_A", "lora_B"), False),
    "no prefix": ("{}".format, ("lora_A", "lora_B"), False),
    "a PEFT adapter with a name": ("base_model.model.{}".format, ("lora_A.mine", "lora_B.mine"), False),
    "old diffusers": (lambda n: f"unet.{of_diffusers(n)}", ("lora.down", "lora.up"), True),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Return an adapter with several ranks and alphas."""
    return uneven(make_adapter(tmp_path_factory.mktemp("adapter"), 4)[1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_read_and_converted_alike(program: str, adapter: Adapter, tmp_path: Path) -> None:
    """Read the same update, and write only names of existing layers in every format."""
    name, matrices, alpha = PROGRAMS[program]
    path = write_flat(adapter, tmp_path / "lora.safetensors", name, matrices, alpha=alpha)
    read = read_adapter(path)
    assert same_update(read, adapter)
    weights = tiny_denoiser().state_dict()
    of_diffusers_too = to_diffusers("denoiser", weights)
    for to, style in FORMATS.items():
        write_adapter(read, to, place(tmp_path, to))
        assert same_update(read_adapter(place(tmp_path, to)), adapter)
        file = place(tmp_path, to) / "adapter_model.safetensors" if to == "peft" else place(tmp_path, to)
        known = of_diffusers_too if style.diffusers else weights
        for tensor in load_file(file):
            assert tensor.startswith(style.prefix)
            layer = tensor.removeprefix(style.prefix).split(".lora_")[0].removesuffix(".alpha")
            names = {name.removesuffix(".weight").replace(".", "_" if style.flat else ".") for name in known}
            assert layer in names, tensor


def test_underscores_are_told_apart_by_the_network() -> None:
    """Find every layer of the largest network, in both naming schemes, with dots and with underscores."""
    with torch.device("meta"):
        model = WanModel(**{**DENOISER, "num_layers": 12, "has_image_input": True, "has_image_pos_emb": True})
    parameters = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".bias")}
    for official, other in zip(parameters, to_diffusers("denoiser", parameters), strict=True):
        wanted = official.removesuffix(".weight")
        for written in (wanted, other.removesuffix(".weight")):
            assert denoiser_path(written) == wanted
            assert denoiser_path(written.replace(".", "_"), flat=True) == wanted


UNKNOWN: dict[str, Callable[[str], str]] = {
    "musubi-tuner of another model": lambda _: "lora_unet_double_blocks_0_img_attn_qkv",
    "underscores that are no layer": lambda _: "lora_unet_blocks_0_self_attn_q_img",
    "VACE": "vace_{}".format,
    "VACE of VideoX-Fun": lambda layer: "lora_unet__vace_" + layer.replace(".", "_"),
    "an unknown prefix": "net.{}".format,
    "a block without a number": lambda _: "transformer.blocks.attn1.to_q",
    "a norm, which is no matrix": lambda _: "diffusion_model.blocks.0.self_attn.norm_q",
    "a parameter": lambda _: "diffusion_model.blocks.0.modulation",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_layers_that_the_denoiser_does_not_have_are_refused(kind: str, adapter: Adapter, tmp_path: Path) -> None:
    layer, pair = next(iter(adapter.layers.items()))
    one = replace(adapter, layers={layer: pair})
    path = write_flat(one, tmp_path / "lora.safetensors", UNKNOWN[kind], ("lora_down", "lora_up"))
    with pytest.raises(
        ConfigError, match=r"lora\.safetensors has \d tensors of layers that the denoiser does not have"
    ):
        read_adapter(path)


def test_two_experts_in_one_file_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    both: dict[str, Tensor] = {}
    for prefix in ("transformer", "transformer_2"):
        write_flat(adapter, path, lambda n, p=prefix: f"{p}.{of_diffusers(n)}", ("lora_A", "lora_B"), alpha=False)
        both |= load_file(path)
    save_file(both, path)
    with pytest.raises(ConfigError, match=r"twice, once as transformer"):
        read_adapter(path)
    half = {n: t for n, t in both.items() if n.startswith("transformer.") == ("blocks.0." in n)}
    save_file(half, path)
    with pytest.raises(
        ConfigError, match=r"2 prefixes \('transformer\.', 'transformer_2\.'\), possibly of several models"
    ):
        read_adapter(path)


TEXT = {
    "diffusers": "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight",
    "kohya": "lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_{}.weight",
    "VideoX-Fun": "lora_te__encoder_block_0_layer_0_SelfAttention_q.lora_{}.weight",
    "ComfyUI": "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight",
}


@pytest.mark.parametrize("program", TEXT)
def test_a_text_encoder_is_left_out_with_a_word(
    program: str, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_flat(adapter, tmp_path / "lora.safetensors", "diffusion_model.{}".format, ("lora_A", "lora_B"))
    text: dict[str, Any] = {TEXT[program].format(kind): torch.randn(4, 4) for kind in "AB"}
    save_file({**load_file(path), **text}, path)
    with caplog.at_level(logging.WARNING, "frostline"):
        read = read_adapter(path)
    assert same_update(read, adapter)
    assert f"skipped 2 tensors of a text encoder, the first is {next(iter(text))}" in caplog.text


def test_metadata_of_kohyas_programs_does_not_count(adapter: Adapter, tmp_path: Path) -> None:
    """Ignore metadata: kohya's converter multiplies alpha into the matrices, but leaves alpha in the metadata."""
    path = tmp_path / "lora.safetensors"
    said = {"ss_network_alpha": "64", "ss_network_dim": "32", "ss_network_module": "networks.lora_wan"}
    write_flat(adapter, path, "diffusion_model.{}".format, ("lora_A", "lora_B"), alpha=False, metadata=said)
    assert same_update(read_adapter(path), adapter)
