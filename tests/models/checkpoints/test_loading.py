"""Loading of built-in models and of folders in the official layout; refusal of invalid files."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_wan
import torch
from diffsynth.configs.model_configs import MODEL_CONFIGS
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_
from safetensors.torch import save_file
from small_wan import TEXT, TOKENIZER, VAE
from torch import Tensor, nn

import frostline.models.checkpoints.loading as loading
from frostline.errors import ConfigError
from frostline.models.checkpoints.formats.architecture import denoiser_arguments
from frostline.models.checkpoints.loading import load_components

EMBEDDED = Path(loading.__file__).parents[1] / "tiny" / "weights"
VAE38 = {"dim": 8, "z_dim": 48, "dec_dim": 8, "num_res_blocks": 1}
DENOISER: dict[str, Any] = {**small_wan.DENOISER, "num_layers": 3}
TI2V: dict[str, Any] = {
    **DENOISER,
    "in_dim": 48,
    "out_dim": 48,
    "require_vae_embedding": False,
    "seperated_timestep": True,
    "fuse_vae_embedding_in_latents": True,
}


@pytest.mark.parametrize(
    ("name", "experts", "takes_image_latents", "pins_first_frame"),
    [("tiny", 1, True, False), ("tiny-moe", 2, True, False), ("tiny-ti2v", 1, False, True)],
)
def test_embedded_models(name: str, experts: int, takes_image_latents: bool, pins_first_frame: bool) -> None:
    components = load_components(name)
    assert components.name == name
    assert components.takes_image_latents is takes_image_latents
    assert components.pins_first_frame is pins_first_frame
    assert not components.takes_clip_feature
    assert (components.denoiser_high_noise is not None) == (experts == 2)
    assert components.image_encoder is None
    assert components.boundary == 0.9
    assert (components.text_length, components.spec.geometry.spatial_stride) == (16, 8)
    names = [module for module, _ in components.modules()]
    assert names == ["text_encoder", "vae", "denoiser", *["denoiser_high_noise"] * (experts - 1)]
    for _, module in components.modules():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        assert not any(parameter.is_meta for parameter in module.parameters())


def test_the_type_is_that_asked_for() -> None:
    for _, module in load_components("tiny-moe", torch.bfloat16).modules():
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_embedded_weights_are_small_and_hold_no_code() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) <= 12e6


class Checkpoint:
    """A small checkpoint in the official layout with random weights, and the tensors that were written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, dict[str, Tensor]] = {}
        shutil.copytree(TOKENIZER, folder / "google" / "umt5-xxl")

    def write_torch(self, part: str, name: str, model: nn.Module) -> None:
        """Write a plain state dict, pickled by torch, like the official VAE and text encoder."""
        self.tensors[part] = random_tensors(model)
        torch.save(self.tensors[part], self.folder / name)

    def write_denoiser(self, part: str, subfolder: str, arguments: dict[str, Any], model_type: str) -> None:
        """Write safetensors in shards, in alphabetical order, and `config.json`, like the official denoisers."""
        folder = self.folder / subfolder
        folder.mkdir(exist_ok=True)
        tensors = self.tensors[part] = random_tensors(WanModel(**arguments))
        names, half = sorted(tensors), len(tensors) // 2
        for number, shard in enumerate((names[:half], names[half:]), start=1):
            path = folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in shard}, path, metadata={"format": "pt"})
        keys = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim")
        config = {"_class_name": "WanModel", "model_type": model_type, **{key: arguments[key] for key in keys}}
        (folder / "config.json").write_text(json.dumps(config))

    def describe(self, **sizes: Any) -> None:
        """Write sizes that differ from the official ones into `config.json`."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**config, "text_encoder": TEXT, "text_len": 16, **sizes}))


def random_tensors(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Return a checkpoint of Wan2.1 image-to-video, without CLIP."""
    checkpoint = Checkpoint(tmp_path / "Wan2.1-Small")
    checkpoint.write_torch("vae", "Wan2.1_VAE.pth", VideoVAE_(**VAE))
    checkpoint.write_torch("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth", WanTextEncoder(**TEXT))
    checkpoint.write_denoiser("denoiser", ".", DENOISER, "i2v")
    checkpoint.describe(vae=VAE)
    return checkpoint


def assert_holds(module: Any, tensors: dict[str, Tensor]) -> None:
    loaded = module.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_official_layout(checkpoint: Checkpoint) -> None:
    components = load_components(checkpoint.folder)
    assert components.name == "Wan2.1-Small"
    for part, module in components.modules():
        assert_holds(module.model if part == "vae" else module, checkpoint.tensors[part])
    assert components.takes_image_latents
    assert not components.pins_first_frame
    assert components.denoiser.blocks[0].num_heads == 2
    ids, mask = components.tokenizer(["a person nods"], return_mask=True)
    assert ids.shape == mask.shape == (1, 16)


def test_the_layout_of_two_experts(checkpoint: Checkpoint) -> None:
    for path in checkpoint.folder.glob("diffusion*"):
        path.unlink()
    checkpoint.write_denoiser("denoiser", "low_noise_model", DENOISER, "i2v")
    checkpoint.write_denoiser("denoiser_high_noise", "high_noise_model", {**DENOISER, "num_layers": 2}, "i2v")
    checkpoint.describe(boundary=0.875)
    components = load_components(checkpoint.folder)
    assert components.boundary == 0.875
    assert_holds(components.denoiser, checkpoint.tensors["denoiser"])
    assert_holds(components.denoiser_high_noise, checkpoint.tensors["denoiser_high_noise"])
    shutil.rmtree(checkpoint.folder / "high_noise_model")
    with pytest.raises(ConfigError, match="high_noise_model"):
        load_components(checkpoint.folder)


def test_the_layout_of_wan22_ti2v(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / "Wan2.1_VAE.pth").unlink()
    checkpoint.write_torch("vae", "Wan2.2_VAE.pth", VideoVAE38_(**VAE38))
    checkpoint.write_denoiser("denoiser", ".", TI2V, "ti2v")
    checkpoint.describe(vae=VAE38)
    components = load_components(checkpoint.folder)
    assert_holds(components.vae.model, checkpoint.tensors["vae"])
    assert_holds(components.denoiser, checkpoint.tensors["denoiser"])
    assert components.pins_first_frame
    assert not components.takes_image_latents
    assert components.spec.geometry.spatial_stride == 16


def official_denoisers() -> list[dict[str, Any]]:
    """Return the arguments of diffsynth's `WanModel` for the released checkpoints, except those with extra inputs."""
    extra = ("has_ref_conv", "add_control_adapter")
    found = []
    for config in MODEL_CONFIGS:
        arguments = config.get("extra_kwargs", {})
        plain = config.get("model_class", "").endswith("wan_video_dit.WanModel") and "in_dim" in arguments
        if plain and not any(name in arguments or "wantodance" in str(arguments) for name in extra):
            found.append(arguments)
    return found


def test_official_checkpoints_are_recognised_by_their_shapes() -> None:
    officials = official_denoisers()
    assert {(a["in_dim"], a["dim"]) for a in officials} >= {(16, 1536), (36, 5120), (48, 3072)}
    for official in officials:
        pins = official.get("seperated_timestep", False)
        with torch.device("meta"):
            tensors = WanModel(**{**official, "num_layers": 2}).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        arguments = denoiser_arguments(shapes, {})
        expected = {**official, "patch_size": tuple(official["patch_size"]), "num_layers": 2}
        assert arguments == {**arguments, **expected}
        assert arguments["seperated_timestep"] is arguments["fuse_vae_embedding_in_latents"] is pins


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _resave(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = torch.load(path, weights_only=True)
    torch.save({name: change(tensor) for name, tensor in tensors.items()}, path)


SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no VAE": ("Wan2.1_VAE.pth", Path.unlink),
    "no text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", Path.unlink),
    "no tokenizer": ("google/umt5-xxl", shutil.rmtree),
    "an empty tokenizer folder": ("google/umt5-xxl", lambda path: [file.unlink() for file in path.iterdir()]),
    "no second shard": (SHARD, Path.unlink),
    "truncated safetensors": (SHARD, _truncate),
    "truncated VAE": ("Wan2.1_VAE.pth", _truncate),
    "truncated text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", _truncate),
    "empty VAE": ("Wan2.1_VAE.pth", lambda path: path.write_bytes(b"")),
    "a list for a VAE": ("Wan2.1_VAE.pth", lambda path: torch.save([1, 2], path)),
    "a list for a text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", lambda path: torch.save([1, 2], path)),
    "a VAE of other shapes": ("Wan2.1_VAE.pth", lambda path: _resave(path, lambda tensor: tensor[..., None])),
    "a text encoder of other shapes": (
        "models_t5_umt5-xxl-enc-bf16.pth",
        lambda path: _resave(path, lambda tensor: tensor[:1].clone()),
    ),
    "no JSON": ("config.json", lambda path: path.write_text("{")),
    "a list for a config": ("config.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_by_name(checkpoint: Checkpoint, fault: str) -> None:
    name, spoil = FAULTS[fault]
    spoil(checkpoint.folder / name)
    with pytest.raises(ConfigError) as error:
        load_components(checkpoint.folder)
    assert str(checkpoint.folder) in str(error.value)
    named = {"Wan2.1_VAE.pth": "VAE", "models_t5_umt5-xxl-enc-bf16.pth": "models_t5"}.get(name, name)
    assert named in str(error.value)


def test_a_denoiser_of_other_shapes_is_refused(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.tensors["denoiser"]
    for name, shape in (("blocks.1.ffn.2.bias", (7,)), ("head.head.weight", (64, 128)), ("patch_embedding.weight", ())):
        (checkpoint.folder / SHARD).unlink(missing_ok=True)
        for path in checkpoint.folder.glob("diffusion*"):
            path.unlink()
        save_file({**tensors, name: torch.zeros(shape)}, checkpoint.folder / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ConfigError, match=str(checkpoint.folder)):
            load_components(checkpoint.folder)


def test_a_checkpoint_of_something_else_is_refused(checkpoint: Checkpoint) -> None:
    for path in checkpoint.folder.glob("diffusion*"):
        path.unlink()
    with pytest.raises(ConfigError, match=rf"{checkpoint.folder}: found VAE, text encoder; missing: the denoiser"):
        load_components(checkpoint.folder)
    save_file({"weight": torch.zeros(2)}, checkpoint.folder / "something.safetensors")
    with pytest.raises(ConfigError, match=r"not part of a Wan model: something\.safetensors; missing: the denoiser"):
        load_components(checkpoint.folder)
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2)}, checkpoint.folder / "something.safetensors")
    with pytest.raises(ConfigError, match=r"something\.safetensors contains no Wan denoiser.*patch_embedding"):
        load_components(checkpoint.folder)


def test_two_files_for_one_part_are_refused(checkpoint: Checkpoint) -> None:
    shutil.copy(checkpoint.folder / "Wan2.1_VAE.pth", checkpoint.folder / "Wan2.2_VAE.pth")
    with pytest.raises(ConfigError, match=r"VAE.*found 2"):
        load_components(checkpoint.folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is neither a directory nor a built-in model \(tiny"):
        load_components(tmp_path / "nowhere")


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "executed"))


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["as torch saves", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(
    checkpoint: Checkpoint, tmp_path: Path, name: str, zipped: bool
) -> None:
    marker, path = tmp_path / "marker", checkpoint.folder / name
    content = {**torch.load(path, weights_only=True), "extra": Payload(marker)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Payload(marker)}, protocol=2))
    with pytest.raises(ConfigError, match=str(path)):
        load_components(checkpoint.folder)
    assert not marker.exists()
    if not zipped:
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the payload must run when it is unpickled"


def test_nan_weights_are_loaded_as_they_are(checkpoint: Checkpoint) -> None:
    """Neither repair nor reject NaN: the model has the values of the file."""
    path = checkpoint.folder / "Wan2.1_VAE.pth"
    _resave(path, lambda tensor: torch.full_like(tensor, math.nan))
    vae = load_components(checkpoint.folder).vae
    assert all(parameter.isnan().all() for parameter in vae.parameters())
