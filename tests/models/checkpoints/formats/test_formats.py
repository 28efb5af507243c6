"""Every variant in every layout: detected from its tensors, loaded bit for bit, or refused with what is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    DENOISER,
    LAYOUTS,
    TEXT,
    TOKENIZER,
    VAE,
    VAE38,
    VARIANTS,
    make_tensors,
    random_tensors,
    save_shards,
    write_diffusers,
    write_files,
    write_official,
)
from diffsynth.core.loader.config import ModelConfig
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.formats.convert import to_diffusers, to_official
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import read_spec
from frostline.models.wan.image import ImageEncoder
from frostline.models.wan.text import TextEncoder

# Names and shapes of diffusers' own models of these sizes: `WanTransformer3DModel` of one block with CLIP and first and
# last frame, `AutoencoderKLWan` of one residual block, and the same with `is_residual`.
DIFFUSERS_SHAPES = json.loads((Path(__file__).parent / "diffusers_shapes.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_in_a_layout(name: str, layout: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    tensors = make_tensors(variant)
    model = LAYOUTS[layout](tmp_path / name, variant, tensors)
    assert find_files(model).variant == variant.says
    components = load_components(model)
    assert {field for field, _ in components.modules()} == tensors.keys()
    for field, module in components.modules():
        inner: Any = module.model if field in ("vae", "image_encoder") else module
        loaded = inner.state_dict()
        assert loaded.keys() == tensors[field].keys()
        # CLIP's projection is not used, and files of diffusers do not contain it.
        left_out = ("visual.head", "log_scale") if layout == "diffusers" else ()
        assert all(torch.equal(loaded[n], t) for n, t in tensors[field].items() if n not in left_out), field
    if variant.experts == 2:
        assert components.boundary == variant.boundary
    assert components.denoiser.blocks[0].num_heads == 2
    assert components.spec.geometry.spatial_multiple == (32 if variant.vae is VAE38 else 16)
    if not isinstance(model, list):
        assert read_spec(model).geometry.spatial_multiple == components.spec.geometry.spatial_multiple
    assert components.takes_image_latents == (variant.denoiser["in_dim"] == 36)
    assert components.takes_clip_feature == ("image_encoder" in tensors)
    assert components.pins_first_frame == (variant.vae is VAE38)


def test_the_names_are_those_of_diffusers() -> None:
    arguments = {**DENOISER, "text_dim": 4096, "num_layers": 1, "has_image_input": True, "has_image_pos_emb": True}
    with torch.device("meta"):
        models: dict[str, Any] = {
            "denoiser": WanModel(**arguments),
            "vae": VideoVAE_(**VAE),
            "vae_of_ti2v": VideoVAE38_(**{**VAE38, "dec_dim": 8}),
        }
        models = {name: model.state_dict() for name, model in models.items()}
    for name, tensors in models.items():
        part: Any = name.removesuffix("_of_ti2v")
        spelled = to_diffusers(part, tensors)
        assert {n: list(t.shape) for n, t in spelled.items()} == DIFFUSERS_SHAPES[name]
        assert to_official(part, spelled).keys() == tensors.keys()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_a_vae_there_and_back(depth: int, nested: bool) -> None:
    with torch.device("meta"):
        arguments = {**(VAE38 if nested else VAE), "num_res_blocks": depth}
        names = (VideoVAE38_ if nested else VideoVAE_)(**arguments).state_dict()
    numbered = {name: torch.tensor(float(index)) for index, name in enumerate(names)}
    spelled = to_diffusers("vae", numbered)
    assert len(spelled) == len(names)
    assert to_official("vae", spelled) == numbered


def test_umt5_of_transformers_computes_the_same(tmp_path: Path) -> None:
    """Compare the outputs, which are only equal if each tensor is loaded into the right parameter."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=TEXT["vocab"],
        d_model=TEXT["dim"],
        d_kv=TEXT["dim_attn"] // TEXT["num_heads"],
        d_ff=TEXT["dim_ffn"],
        num_heads=TEXT["num_heads"],
        num_layers=TEXT["num_layers"],
        relative_attention_num_buckets=TEXT["num_buckets"],
        feed_forward_proj="gated-gelu",
    )
    theirs = UMT5EncoderModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = diffusers_folder(tmp_path, "Wan2.1-T2V")
    shutil.rmtree(folder / "text_encoder")
    theirs.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    ours = TextEncoder(load_components(folder).text_encoder)
    ids, mask = torch.randint(0, 64, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]
        torch.testing.assert_close(ours(ids, mask), expected, atol=1e-4, rtol=1e-4)


def test_clip_of_transformers_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=2,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
        projection_dim=1024,
    )
    theirs = CLIPVisionModel(config).eval()
    folder = diffusers_folder(tmp_path, "Wan2.1-I2V")
    shutil.rmtree(folder / "image_encoder")
    theirs.save_pretrained(folder / "image_encoder")
    encoder = load_components(folder).image_encoder
    assert encoder is not None
    ours = ImageEncoder(encoder)
    image = torch.rand(1, 3, 224, 224) * 2 - 1
    pixels = (image * 0.5 + 0.5 - ours.mean) / ours.std
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours(image), expected, atol=2e-4, rtol=2e-4)


def diffusers_folder(tmp_path: Path, name: str) -> Path:
    return write_diffusers(tmp_path / name, VARIANTS[name], make_tensors(VARIANTS[name]))


def test_configs_of_diffsynth_are_taken(tmp_path: Path) -> None:
    variant = VARIANTS["Wan2.2-T2V-A14B"]
    tensors = make_tensors(variant)
    listed = write_files(tmp_path / "files", variant, tensors)
    configs = [ModelConfig(path=[str(p) for p in e] if isinstance(e, list) else str(e)) for e in listed]
    components = load_components(configs)
    assert torch.equal(components.denoiser.head.head.weight, tensors["denoiser"]["head.head.weight"])
    with pytest.raises(ConfigError, match="does not download models"):
        load_components([ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="*.pth")])


TELLING = {
    "folders": ("high_noise_model/wan", "low_noise_model/wan"),
    "a parent with a low in it": ("workflows/high_noise/wan", "workflows/low_noise/wan"),
    "as diffusers has them": ("transformer/model", "transformer_2/model"),
    "a parent called low": ("Wan-Low-VRAM/wan_high", "Wan-Low-VRAM/wan_low"),
    "a word with a low in it": ("workflow-high", "workflow-low"),
    "such a word in each folder": ("high/flow_a", "low/flow_b"),
    "humps": ("Wan22_HighNoise", "Wan22_LowNoise"),
    "capitals": ("models/wan-HIGH", "other/wan-LOW"),
}
NOT_TELLING = {
    "neither": ("expert_a", "expert_b"),
    "one alone": ("workflow", "expert"),
    "both words in both": ("high/low", "low/high"),
    "both words in one": ("high/slow", "low/fast"),
    "the same twice": ("wan_high", "wan_high"),
}


@pytest.mark.parametrize("names", TELLING)
def test_two_experts_in_a_list_are_told_apart_by_name(names: str, tmp_path: Path) -> None:
    high, low = write_experts(tmp_path, TELLING[names])
    rest = others(tmp_path)
    for order in ((high, low), (low, high)):
        files = find_files([*order, *rest])
        assert files.networks["denoiser_high_noise"].paths == (high,)
        assert files.denoiser.paths == (low,)


@pytest.mark.parametrize("names", NOT_TELLING)
def test_experts_whose_names_do_not_tell_are_refused(names: str, tmp_path: Path) -> None:
    one, other = write_experts(tmp_path, NOT_TELLING[names])
    with pytest.raises(ConfigError, match=f'{one} and {other} are both denoisers.*put "high" in'):
        find_files([one, other, *others(tmp_path)])


def others(tmp_path: Path) -> list[Any]:
    """Return everything that a model with two experts needs, except the experts."""
    variant = VARIANTS["Wan2.2-T2V-A14B"]
    listed = write_files(tmp_path / "files", variant, make_tensors(variant))
    return [entry for entry in listed if "noise" not in str(entry)]


def write_experts(tmp_path: Path, names: tuple[str, str]) -> list[Path]:
    with torch.device("meta"):
        model = WanModel(**{**DENOISER, "in_dim": 16, "num_layers": 1})
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(random_tensors(model, seed=seed), path)
    return paths


def test_the_type_in_the_files_is_cast(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, "Wan2.1-T2V")
    for _, module in load_components(folder, torch.bfloat16).modules():
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


MISSING = {
    "denoiser": ("transformer", r"found VAE, text encoder.*missing: the denoiser \("),
    "vae": ("vae", r"found denoiser \(image-to-video with CLIP\).*missing: the VAE \("),
    "text encoder": ("text_encoder", r"missing: the text encoder \("),
    "image encoder": ("image_encoder", r"missing: the image encoder \("),
    "tokenizer": ("tokenizer", r"missing: the tokenizer \("),
}


@pytest.mark.parametrize("part", MISSING)
def test_what_is_found_and_what_is_missing_is_said(part: str, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, "Wan2.1-I2V")
    name, said = MISSING[part]
    shutil.rmtree(folder / name)
    with pytest.raises(ConfigError, match=said) as error:
        find_files(folder)
    assert str(folder) in str(error.value)


def _denoiser(tmp_path: Path, change: dict[str, Tensor], **arguments: Any) -> Path:
    folder = write_official(tmp_path / "Wan", VARIANTS["Wan2.1-I2V"], make_tensors(VARIANTS["Wan2.1-I2V"]))
    for path in folder.glob("diffusion*"):
        path.unlink()
    with torch.device("meta"):
        model = WanModel(**{**VARIANTS["Wan2.1-I2V"].denoiser, **arguments})
    save_file({**random_tensors(model), **change}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, {"has_image_pos_emb": True}, "first-and-last-frame"),
        ({}, {"in_dim": 32}, "16 control channels"),
        ({"vace_blocks.0.after_proj.weight": torch.zeros(2)}, {}, "vace_blocks"),
    ],
    ids=["first and last frame", "control", "VACE"],
)
def test_a_denoiser_that_wants_more_is_refused(
    change: dict[str, Tensor], arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_components(_denoiser(tmp_path, change, **arguments))


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, "Wan2.1-T2V")
    index = next((folder / "transformer").glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../vae/diffusion_pytorch_model.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not a file in the same folder"):
        load_components(folder)


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, "Wan2.1-T2V")
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00002\.safetensors is missing"):
        load_components(folder)


def test_names_of_neither_spelling_are_refused(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, "Wan2.1-T2V")
    tensors = to_diffusers("denoiser", make_tensors(VARIANTS["Wan2.1-T2V"])["denoiser"])
    for path in (folder / "transformer").iterdir():
        path.unlink()
    save_shards(
        {**tensors, "blocks.0.attn3.to_q.weight": torch.zeros(1)}, folder / "transformer", "diffusion_pytorch_model"
    )
    with pytest.raises(ConfigError, match=r"1 tensors do not belong to a Wan denoiser, the first is blocks\.0\.attn3"):
        load_components(folder)


def test_an_unknown_file_in_a_list_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"found nothing; not part of a Wan model: lora\.safetensors"):
        find_files([tmp_path / "lora.safetensors", TOKENIZER])
    with pytest.raises(ConfigError, match="nowhere: no such file"):
        find_files([tmp_path / "nowhere"])
