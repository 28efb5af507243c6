"""Layers are quantised when their weights are read, from the files of any program."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VARIANTS, make_tensors, write_diffusers, write_official
from safetensors.torch import load_file, save_file
from tiny_t2v import TINY
from torch import Tensor, nn

from frostline.config import QuantizationSettings
from frostline.models.checkpoints.checkpoint_files import find_files
from frostline.models.checkpoints.loading import load_components
from frostline.models.checkpoints.quantised_reading import StoredLayers
from frostline.models.quantization.linear import QuantisedLinear, quantise_layers, quantised_layers
from frostline.models.quantization.storage import FORMATS
from frostline.stages.families import family_of
from frostline.train.memory.tracker import MemoryTracker

KINDS = [*FORMATS]
CPU = torch.device("cpu")
DENOISER = "diffusion_pytorch_model.safetensors"
TEXT = "models_t5_umt5-xxl-enc.safetensors"
NETWORKS = ("denoiser", "text_encoder")


def load(model: Any, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    storage = dict.fromkeys((*NETWORKS, "denoiser_high_noise"), kind)
    return load_components(model, dtype, storage=storage, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_layers_of_blocks_are_quantised_and_others_are_not(model: str, dtype: torch.dtype, kind: str) -> None:
    plain, quantised = load_components(model, dtype), load(model, kind, dtype)
    for name, network in plain.modules():
        layers = quantised_layers(getattr(quantised, name))
        linear = {p for p, m in network.named_modules() if type(m) is nn.Linear and p.startswith("blocks.")}
        assert layers.keys() == (linear if name.startswith(("denoiser", "text")) else set())
        for path, layer in layers.items():
            given = network.get_submodule(path).weight
            codes, scale = FORMATS[kind].quantise(given)
            assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)
            assert layer.weight.dtype == dtype
        stored = {f"{path}.{leaf}" for path in layers for leaf in ("codes", "scale")}
        state = getattr(quantised, name).state_dict()
        assert stored <= state.keys()
        of_files = network.state_dict()
        assert state.keys() - stored == of_files.keys() - {f"{path}.weight" for path in layers}
        assert all(torch.equal(state[key], of_files[key]) for key in state.keys() - stored)


def test_files_of_diffusers_give_the_same(tmp_path: Path) -> None:
    variant = VARIANTS["Wan2.1-T2V"]
    tensors = make_tensors(variant)
    folders = [write(tmp_path / write.__name__, variant, tensors) for write in (write_official, write_diffusers)]
    for kind in KINDS:
        for name in NETWORKS:
            one, other = (getattr(load(str(folder), kind), name).state_dict() for folder in folders)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("name", NETWORKS)
def test_never_are_there_two_copies(name: str, form: str, kind: str, tmp_path: Path) -> None:
    """Hold at most the final tensors and the temporaries of one weight while reading; mapped files take no memory."""
    model: str | Path = "tiny"
    if form == "pth":
        model = shutil.copytree(TINY, tmp_path / "model")
        for path in [path for path in model.glob("*.safetensors") if path.name in (DENOISER, TEXT)]:
            torch.save(load_file(path), path.with_suffix(".pth"))
            path.unlink()
    network = find_files(model).networks[name]
    module = find_files(model).spec.build(name)
    largest = max(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    quantise_layers(module, kind, torch.float32)
    stored = StoredLayers.of(module)
    assert stored is not None
    with MemoryTracker(()) as tracker:
        state = dict(stored.read(network, torch.float32, "cpu", None))
    stays = sum(tensor.nbytes for tensor in state.values())
    assert stays < 0.75 * sum(4 * math.prod(shape) for shape in network.shapes.values())
    mapped = sum(path.stat().st_size for path in network.paths) if form == "pth" else 0
    # The weight as stored and in fp32, its magnitudes or blocks, scaled and rounded; for NF4 also indices of 4 bytes.
    assert tracker.peak <= stays + mapped + 22 * largest


def eight_bits(folder: Path, scale_of: Any, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, tuple[Tensor, Any]]:
    """Write a copy of tiny with a denoiser in 8 bits; return the codes and the scale of each layer."""
    shutil.copytree(TINY, folder)
    tensors, stored = load_file(folder / DENOISER), {}
    (folder / DENOISER).unlink()
    for name, weight in [*tensors.items()]:
        if weight.ndim != 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
            continue
        scale = scale_of(weight.float())
        divided = weight.float() if scale is None else weight.float() / (scale if scale.ndim == 0 else scale[:, None])
        tensors[name] = divided.to(dtype)
        if scale is not None:
            tensors[name.replace(".weight", ".scale_weight")] = scale.contiguous()
        stored[name.removesuffix(".weight")] = tensors[name], scale
    save_file(tensors, folder / DENOISER)
    return stored


SCALES = {
    "tensor": lambda weight: weight.abs().max() / 448,
    "row": lambda weight: weight.abs().amax(1) / 448,
    "none": lambda weight: None,
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_8_bits_stay_as_they_are(scales: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = eight_bits(tmp_path / "model", SCALES[scales])
    plain = load_components(str(tmp_path / "model"), dtype).denoiser
    layers = quantised_layers(load(str(tmp_path / "model"), "fp8", dtype).denoiser)
    assert layers.keys() == stored.keys()
    for path, layer in layers.items():
        assert torch.equal(layer.codes, stored[path][0].view(torch.uint8))
        assert torch.equal(layer.weight, plain.get_submodule(path).weight)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_other_files_of_8_bits_are_quantised_again(kind: str, tmp_path: Path) -> None:
    eight_bits(tmp_path / "model", SCALES["row"], torch.float8_e5m2)
    plain = load_components(str(tmp_path / "model"), torch.float32).denoiser
    for path, layer in quantised_layers(load(str(tmp_path / "model"), kind).denoiser).items():
        codes, scale = FORMATS[kind].quantise(plain.get_submodule(path).weight)
        assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["text_encoder", "denoiser_high_noise"])
def test_weights_that_are_away_come_back(part: str, kind: str) -> None:
    there = getattr(load("tiny-moe", kind, torch.bfloat16), part).state_dict()
    components = load("tiny-moe", kind, torch.bfloat16, defer=(part,))
    weights, module = components.weights[part], getattr(components, part)
    assert not weights.resident
    assert weights.nbytes == sum(tensor.nbytes for tensor in there.values())
    for _ in range(2):
        weights.restore()
        found = module.state_dict()
        assert found.keys() == there.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in there.items())
        assert weights.as_read
        weights.release()
        assert sum(p.nbytes for p in module.parameters()) == 0


def test_each_setting_is_of_its_own_networks() -> None:
    def stored(**settings: Any) -> set[str]:
        quantization = QuantizationSettings.parse(settings)
        components = family_of("tiny-moe").load("tiny-moe", torch.float32, CPU, False, quantization=quantization)
        return {
            name
            for name, module in components.modules()
            if any(isinstance(layer, QuantisedLinear) for layer in module.modules())
        }

    assert stored() == set()
    assert stored(quantization="int8") == {"denoiser", "denoiser_high_noise"}
    assert stored(text_encoder_quantization="nf4") == {"text_encoder"}
