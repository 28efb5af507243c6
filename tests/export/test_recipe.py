"""Recipes: those of the package, and how a user's recipe is read or refused."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from frostline import recipes
from frostline.config import LoraSettings
from frostline.errors import ConfigError
from frostline.export.recipe import Recipe, load_recipe
from frostline.rewards.config import default_rewards, stage_names
from frostline.stages.families import family_of
from frostline.stages.shapes import ShapeRange

SHIPPED = sorted((Path(recipes.__file__).parent / "export").glob("*.yaml"))


def test_there_is_a_recipe_for_every_released_model() -> None:
    assert {path.stem for path in SHIPPED} >= {
        "tiny",
        "Wan2.1-T2V-1.3B",
        "Wan2.1-I2V-14B-480P",
        "Wan2.2-TI2V-5B",
        "Wan2.2-I2V-A14B",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_found_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find a recipe by name from any folder."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path.stem, {})
    assert recipe == load_recipe(str(path), {})
    assert Path(recipe.model).name == path.stem
    assert recipe.lora is not None
    assert recipe.lora.rank in range(recipe.shapes.rank[0], recipe.shapes.rank[2] + 1)
    if path.stem == "tiny":
        assert recipe.shapes == ShapeRange()
        assert recipe.dtype == torch.float32
    else:
        assert recipe.dtype == torch.bfloat16
        assert recipe.backends_for("bf16") == ("tensorrt",)
        assert recipe.backends_for("fp32") == ("tensorrt", "onnxruntime")
        assert recipe.shapes.height[1] >= 480


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_model_without_recipe_gets_the_defaults(tmp_path: Path) -> None:
    assert load_recipe("tiny-moe", {}) == Recipe(model="tiny-moe")
    assert load_recipe(str(tmp_path), {}) == Recipe(model=str(tmp_path))
    recipe = Recipe(model="tiny-moe")
    assert (recipe.stages, recipe.backends, recipe.precision) == (("all",), ("onnxruntime",), "fp32")
    assert recipe.lora == LoraSettings()


def test_a_stage_gets_the_backends_that_compute_in_its_precision() -> None:
    recipe = Recipe(model="tiny", backends=("openvino", "onnxruntime"))
    assert recipe.backends_for("bf16") == ("openvino",)
    assert recipe.backends_for("fp16") == recipe.backends
    alone = Recipe(model="tiny", backends=("onnxruntime",))
    assert alone.backends_for("bf16") == ("onnxruntime",), "the export then reports why it fails"


def test_changes_go_before_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: tiny\nstages: vae_encoder\nprecision: bf16\nlora: {rank: 4}\n")
    changes: dict[str, Any] = {"stages": "text_encoder, denoiser", "backends": None, "precision": "fp16"}
    recipe = load_recipe(path, changes)
    assert recipe.stages == ("text_encoder", "denoiser")
    assert recipe.precision == "fp16"
    assert recipe.dtype == torch.float16
    assert recipe.backends == ("onnxruntime",)
    assert recipe.lora == LoraSettings(rank=4)
    assert load_recipe(path, {}).stages == ("vae_encoder",)
    assert load_recipe(path, {"model": "tiny-moe"}).model == "tiny-moe"


def test_lists_may_be_written_with_commas(tmp_path: Path) -> None:
    path = write(tmp_path, 'model: tiny\nbackends: [onnxruntime, tensorrt-rtx]\ncompute_capabilities: "8.9, 12.0"\n')
    recipe = load_recipe(path, {})
    assert recipe.backends == ("onnxruntime", "tensorrt-rtx")
    assert recipe.compute_capabilities == ("8.9", "12.0")


@pytest.mark.parametrize("written", ["[8.9, 12.0]", "['8.9', '12.0']", "8.9,12.0", '"8.9, 12.0"'])
def test_compute_capabilities_may_be_numbers(written: str, tmp_path: Path) -> None:
    """Accept numbers, because YAML reads `[8.9, 12.0]` as numbers."""
    recipe = load_recipe(write(tmp_path, f"model: tiny\ncompute_capabilities: {written}\n"), {})
    assert recipe.compute_capabilities == ("8.9", "12.0")
    one = load_recipe(write(tmp_path, "model: tiny\ncompute_capabilities: 8.9\n"), {})
    assert one.compute_capabilities == ("8.9",)


def test_the_dimensions_that_were_asked_for(tmp_path: Path) -> None:
    recipe = Recipe(model="tiny", min_shapes="faces:1x3x12x12", max_shapes="video:2x9x3x128x128")
    assert recipe.asked_maximum == {"batch", "latent_frames", "height", "width"}
    assert Recipe(model="tiny").asked_maximum == frozenset()


def test_all_stages_are_known(make_module: Any) -> None:
    modules = (make_module(model) for model in ("tiny", "tiny-moe", "tiny-ti2v"))
    assert {name for module in modules for name in module.stages} <= {
        *family_of("tiny").STAGES,
        *(stage_names(default_rewards()) or ()),
    }


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("frostline.export.model.load_staged_model", load)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 257}", r"lora\.rank: 257 is out of the range that engines support, 2 to 256: choose another"),
        ("lora: {rank: 1}", r"lora\.rank: 1 is out of the range"),
        ("backends: [onnxruntime, tensorrt]", r"backend tensorrt: .*pip install 'frostline\[tensorrt\]'"),
        ("backends: tensorrt-rtx\ncompute_capabilities: [9.0]", "does not build for sm_90, only for .*SM89"),
        (
            "backends: tensorrt-rtx\ncompute_capabilities: current",
            "finds no NVIDIA GPU on this machine: name a compute",
        ),
    ],
)
def test_what_cannot_be_exported_here_is_told_before_a_model_is_loaded(
    text: str, message: str, tmp_path: Path, unloadable: None, refused_usage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if text.endswith("tensorrt]"):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = refused_usage("export", write(tmp_path, f"model: tiny\n{text}\n"))
    assert re.search(message, said), said


@pytest.mark.parametrize("rank", [2, 256])
def test_ranks_at_the_ends_of_the_range_are_served(rank: int) -> None:
    recipe = Recipe(model="tiny", lora=LoraSettings(rank=rank))
    recipe.check("cpu")
    other = Recipe(model="tiny", lora=LoraSettings(rank=1000), stages=("text_encoder",))
    other.check("cpu")
    Recipe(model="tiny", lora=None).check("cpu")


def test_shapes_are_parsed(tmp_path: Path) -> None:
    path = write(tmp_path, "model: tiny\nmin_shapes: video:1x5x3x64x64\nmax_shapes: video:2x9x3x128x128\n")
    shapes = load_recipe(path, {}).shapes
    assert (shapes.batch, shapes.height) == ((1, 2, 2), (64, 96, 128))
    with pytest.raises(ConfigError, match="--min-shapes"):
        _ = load_recipe(path, {"min_shapes": "video:1"}).shapes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: tiny\nprecison: fp32\n", "precison: unknown setting, did you mean precision"),
        ("model: tiny\nbackend: onnxruntime\n", "backend: unknown setting, did you mean backends"),
        ("model: tiny\nlora: {rnak: 8}\n", r"lora\.rnak: unknown setting, did you mean rank"),
        (
            "model: tiny\nrewards: [{type: sharpness, scael: 8}]\n",
            r"rewards\.0\.scael: unknown setting, did you mean scale",
        ),
        (
            "model: tiny\nrewards: [{type: sharpnes}]\n",
            r"rewards\.0\.type: there is no reward 'sharpnes', did you mean sharp",
        ),
        (
            "model: tiny\nrewards: [{weight: 1}]\n",
            r"rewards\.0\.type: must name a reward, valid names: aesthetic",
        ),
        ("model: tiny\nreward: {scale: 8}\n", "reward: unknown setting, did you mean rewards"),
        (
            "model: tiny\nrewards: []\nstages: face_detector\n",
            "stages: there is no stage 'face_detector'; valid stages: text",
        ),
        ("model: tiny\nxyzzy: 1\n", "xyzzy: unknown setting, valid settings: .*model, stages"),
        ("model: tiny\nprecision: fp8\n", "precision: .*'fp32', 'fp16' or 'bf16'"),
        ("model: tiny\nlora: {rank: 0}\n", r"lora\.rank: .*greater than or equal to 1"),
        ("precision: fp32\n", "model: Field required"),
        ("- tiny\n", "must be a mapping of settings"),
        ("", "must be a mapping of settings"),
        ("model: [tiny\n", "cannot be read"),
        ("model: tiny\nstages: []\n", "stages: empty list: nothing to export"),
        ("model: tiny\nbackends: []\n", "backends: empty list: nothing to export"),
        ("model: tiny\nstages: vae\n", "stages: there is no stage 'vae'; valid stages: text_encoder, "),
        ("model: tiny\nbackends: [tensort]\n", "unknown backend 'tensort'"),
        ("model: tiny\nbackends: [torch]\n", "backends: torch needs no engine: leave it out"),
        (
            "model: tiny\ncompute_capabilities: [sm_89]\n",
            "'sm_89' is not a compute capability: use a value such as 8.9, or current",
        ),
        (
            "model: tiny\ncompute_capabilities: sm_120\n",
            "'sm_120' is not a compute capability: use a value such as 12.0, or current",
        ),
        (
            "model: tiny\ncompute_capabilities: ['89']\n",
            "'89' is not a compute capability: use a value such as 8.9, or current",
        ),
        (
            "model: tiny\ncompute_capabilities: [ada]\n",
            "'ada' is not a compute capability: use a value such as 8.9, or current",
        ),
        ("model: !!python/object/apply:os.getcwd []\n", "cannot be read"),
    ],
)
def test_a_faulty_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text), {})


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_recipe(str(tmp_path / "nowhere.yaml"), {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        load_recipe(str(tmp_path / "binary.yaml"), {})


def test_lora_targets_and_none() -> None:
    recipe = Recipe(model="tiny", lora=LoraSettings(rank=4, alpha=8))
    assert recipe.with_lora(True, None) is recipe
    assert recipe.with_lora(True, "q, ffn.0").lora == LoraSettings(rank=4, alpha=8, target_modules=("q", "ffn.0"))
    assert recipe.with_lora(False, None).lora is None
    assert recipe.with_lora(False, "q").lora is None
    assert recipe.with_lora(False, None).with_lora(True, "q").lora == LoraSettings(target_modules=("q",))
    assert recipe.lora == LoraSettings(rank=4, alpha=8), "the recipe itself must not change"
    with pytest.raises(ConfigError, match="target_modules"):
        recipe.with_lora(True, " , ")
