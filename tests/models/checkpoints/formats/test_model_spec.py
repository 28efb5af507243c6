"""The spec of files equals that of the modules loaded from them, and the spec of a release that of its files."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAYOUTS, TOKENIZER, VARIANTS, make_tensors

from frostline.errors import ConfigError
from frostline.models.checkpoints.checkpoint_files import EMBEDDED, find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.releases import RELEASED, read_spec
from frostline.models.wan.model_spec import ModelSpec

# The path of each network in the folder of a release.
PATHS = {
    "text_encoder": "models_t5.safetensors",
    "vae": "vae.safetensors",
    "denoiser": "diffusion_pytorch_model.safetensors",
    "image_encoder": "models_clip.safetensors",
}
EXPERTS = {
    "denoiser": "low_noise_model/diffusion_pytorch_model.safetensors",
    "denoiser_high_noise": "high_noise_model/diffusion_pytorch_model.safetensors",
}


def assert_is_that_of_its_modules(spec: ModelSpec, model: Any) -> None:
    components = load_components(model)
    denoiser, vae = components.denoiser, components.vae
    assert components.spec == spec
    assert (components.tokenizer.seq_len, denoiser.patch_size) == (spec.text_length, (1, 2, 2))
    assert spec.latent_channels == vae.z_dim == vae.model.z_dim
    assert spec.geometry.spatial_stride == vae.upsampling_factor
    assert spec.geometry.spatial_multiple == vae.upsampling_factor * denoiser.patch_size[1]
    assert spec.geometry.temporal_stride == 2 ** sum(vae.model.temperal_downsample)
    takes_image_latents = denoiser.require_vae_embedding and denoiser.in_dim > vae.model.z_dim
    assert spec.takes_image_latents == components.takes_image_latents == takes_image_latents
    takes_clip_feature = denoiser.has_image_input and denoiser.require_clip_embedding
    assert spec.takes_clip_feature == components.takes_clip_feature == takes_clip_feature
    pins_first_frame = denoiser.seperated_timestep and denoiser.fuse_vae_embedding_in_latents
    assert spec.pins_first_frame == components.pins_first_frame == pins_first_frame
    assert spec.two_experts == (components.denoiser_high_noise is not None)
    assert spec.takes_clip_feature == (components.image_encoder is not None)
    for field, module in components.modules():
        wanted = {name: tensor.shape for name, tensor in spec.build(field).state_dict().items()}
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == wanted
        inner: Any = module.model if field == "vae" else module
        told = {name: value for name, value in spec.networks[field].items() if hasattr(inner, name)}
        assert {name: getattr(inner, name) for name in told} == told
        assert field == "image_encoder" or len(told) >= 4


@pytest.mark.parametrize("name", EMBEDDED)
def test_of_an_embedded_model(name: str) -> None:
    assert_is_that_of_its_modules(read_spec(name), name)


@pytest.mark.parametrize("name", VARIANTS)
def test_of_a_variant(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    tensors = make_tensors(variant)
    folder = LAYOUTS["official"](tmp_path / name, variant, tensors)
    spec = read_spec(folder)
    assert_is_that_of_its_modules(spec, folder)
    spelled = find_files(LAYOUTS["diffusers"](tmp_path / "diffusers", variant, tensors)).spec
    assert replace(spelled, name=name) == spec


@pytest.mark.parametrize("name", RELEASED)
def test_of_a_release_is_that_of_a_folder_of_its_shapes(name: str, tmp_path: Path) -> None:
    spec = read_spec(f"nowhere/{name}")
    folder = tmp_path / name
    shutil.copytree(TOKENIZER, folder / "google" / "umt5-xxl")
    for field in spec.networks:
        network: Any = spec.build(field)
        tensors = (network.model if field in ("vae", "image_encoder") else network).state_dict()
        paths = PATHS | EXPERTS if spec.two_experts else PATHS
        write_empty(folder / paths[field], {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    found = read_spec(folder)
    assert found == spec
    assert (found.from_files, spec.from_files) == (True, False)


def write_empty(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a sparse safetensors file of full size; only its header takes disk space."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)


def test_modules_of_another_model_are_refused() -> None:
    tiny, moe, pinned = (load_components(name) for name in EMBEDDED)
    with pytest.raises(ConfigError, match="tiny: denoiser has in_dim 16, but the spec states 36"):
        replace(tiny, denoiser=pinned.denoiser)
    with pytest.raises(ConfigError, match=r"tiny-moe: the spec has the networks \['denoiser', 'denoiser_high_noise'"):
        replace(moe, denoiser_high_noise=None)
    with pytest.raises(ConfigError, match="tiny: the spec has the networks"):
        replace(moe, spec=tiny.spec)
    with pytest.raises(ConfigError, match="tiny: tokenizer has seq_len 16, but the spec states 512"):
        replace(tiny, spec=replace(tiny.spec, text_length=512))
