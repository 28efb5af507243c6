"""Configuration files: what is read, refused and printed, and the examples."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from frostline import recipes
from frostline.config import _NAMES_OF_OTHERS, dotted_names, nested_settings
from frostline.errors import ConfigError
from frostline.rewards.config import RewardEntry, builtin_names, entry_class
from frostline.rewards.face_identity import Config as FaceIdentity
from frostline.train.config_file import commented_yaml, load_run_settings
from frostline.train.settings import RunSettings
from frostline.train.step_settings import TrainingModuleSettings

FACES = "{type: face_identity, embedder: 'arcface:~/a.onnx', detector: yunet}"
EXAMPLES = Path(recipes.__file__).parent / "train"


def test_overrides_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\ufefftrain: {learning_rate: 1e-3, report_to: none}\nlora:\n  rank: 4\n")
    changes = ["train.learning_rate=1e-5", "lora.target_modules=[q, k]", "noise_seed=null", "train.mixed_precision=no"]
    settings = load_run_settings(path, changes)
    assert settings.train.learning_rate == 1e-5
    assert settings.lora.rank == 4
    assert settings.lora.target_modules == ("q", "k")
    assert settings.noise_seed is None
    assert settings.train.mixed_precision == "no"
    assert settings.train.report_to == ()


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("model: ~/wan\ndata: {source: ~/data}\nrewards: [" + FACES + "]\n")
    settings = load_run_settings(path, ["output_dir=~/runs/one", "plan.engines=~/engines", "cache_dir=a~b"])
    assert settings.model == f"{tmp_path}/wan"
    assert settings.data.source == tmp_path / "data"
    assert settings.output_dir == tmp_path / "runs" / "one"
    assert settings.plan.engines == tmp_path / "engines"
    assert settings.cache_dir == Path("a~b")
    (faces,) = settings.rewards
    assert isinstance(faces, FaceIdentity)
    assert (faces.embedder, faces.detector) == (f"arcface:{tmp_path}/a.onnx", "yunet")
    with pytest.raises(ConfigError, match="output_dir: ~nobody-by-this-name/a: Could not determine home"):
        load_run_settings(path, ["output_dir=~nobody-by-this-name/a"])


def test_entries_of_a_list_are_reached_by_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards:\n- {type: 'a.b:C', weight: 1}\n")
    assert load_run_settings(path, ["rewards.0.weight=2"]).rewards[0].model_dump()["weight"] == 2
    for override in ("rewards.1.weight=2", "rewards.weight=2"):
        with pytest.raises(ConfigError, match="not the index of one of the 1 entries"):
            load_run_settings(path, [override])


def test_entries_that_there_are_by_default_are_reached_too() -> None:
    (faces,) = load_run_settings(None, ["rewards.0.weight=2", "rewards.0.upscale=3"]).rewards
    assert isinstance(faces, FaceIdentity)
    assert (faces.weight, faces.upscale, faces.baseline) == (2, 3, 0.54)
    (sharpness,) = load_run_settings(None, ["rewards.0.type=sharpness"]).rewards
    assert sharpness == RewardEntry.parse({"type": "sharpness"})


BAD: dict[str, tuple[str, list[str], str]] = {
    "unknown": ("lora: {rnk: 3}", [], "lora.rnk: unknown setting, did you mean rank?"),
    "in another section": ("learning_rate: 1e-5", [], "did you mean train.learning_rate?"),
    "diffusers' name": ("train: {lr_scheduler: x}", [], "did you mean lr_scheduler_type?"),
    "PEFT's name": ("lora: {r: 8}", [], "lora.r: unknown setting, did you mean lora.rank?"),
    "transformers' name": ("train: {save_steps: 8}", [], "did you mean train.checkpointing_steps?"),
    "unknown section": ("trian: {seed: 1}", [], "trian: unknown setting, did you mean train?"),
    "in a list": ("rewards: [{type: 'a:B', wieght: 1}]", [], "rewards.0.wieght: unknown setting, did you mean weight?"),
    "of faces": (
        "rewards: [{type: face_identity, detektor: a}]",
        [],
        "rewards.0.detektor: unknown setting, did you mean det",
    ),
    "of the entry before": (
        "rewards: [{type: face_identity}, {type: sharpness, detector: yunet}]",
        [],
        "rewards.1.detector: unknown setting, valid settings: type, weight, baseline, scale, cap, frames, on_unscored",
    ),
    "out of the list": ("weight: 2", [], "weight: unknown setting, did you mean rewards.0.weight?"),
    "one reward": ("reward: {type: sharpness}", [], "reward: unknown setting, did you mean rewards?"),
    "further rewards": (
        "rewards: [{type: sharpness, plus: []}]",
        [],
        "rewards.0.plus: unknown setting, did you mean rewards",
    ),
    "no list": ("rewards: {type: sharpness}", [], "rewards: Input should be a list"),
    "no rewards": ("rewards: []", [], "rewards: empty list: nothing would be rewarded"),
    "no type": (
        "rewards: [{weight: 1}]",
        [],
        "rewards.0.type: must name a reward, valid names: aesthetic, clip, face_identity, ",
    ),
    "a name alone": (
        "rewards: [sharpness]",
        [],
        "rewards.0: must be a mapping with a type, such as {type: ",
    ),
    "another type": (
        "rewards: [{type: sharpnes}]",
        [],
        "rewards.0.type: there is no reward 'sharpnes', did you mean sharpness",
    ),
    "no reward's file": (
        "rewards: [{type: loss}]",
        [],
        "rewards.0.type: there is no reward 'loss', valid names: aesthetic, clip",
    ),
    "a path": (
        "rewards: [{type: ../x}]",
        [],
        "rewards.0.type: there is no reward '../x', valid names: aesthetic, clip",
    ),
    "two of a reward": (
        "rewards: [{type: face_identity, upscale: 0, weight: -1}]",
        [],
        "rewards.0.weight: Input should be greater than or equal to 0; rewards.0.upscale: Input should be greater than",
    ),
    "twice": ("lora: {rank: 1}\nlora: {rank: 2}", [], "duplicate key lora"),
    "no mapping": ("- a\n- b", [], "must be a mapping of settings, not list"),
    "no yaml": ("lora: {rank: 1", [], "is not valid YAML"),
    "python object": ("lora: !!python/object/apply:os.system [true]", [], "is not valid YAML"),
    "negative": ("train: {learning_rate: -1}", [], "train.learning_rate: Input should be greater than 0"),
    "text": ("train: {max_train_steps: many}", [], "train.max_train_steps: Input should be a valid integer"),
    "choice": ("train: {lr_scheduler_type: sine}", [], "'constant_with_warmup'"),
    "fp16": ("train: {mixed_precision: fp16}", [], "train.mixed_precision: Input should be 'no' or 'bf16'"),
    "tracker": ("train: {report_to: [wandbb]}", [], "train.report_to.0"),
    "frames": ("data: {num_frames: 16}", [], "data: num_frames must be 4k+1"),
    "height alone": ("validation: {height: 64}", [], "validation: height and width must be set together"),
    "steps": ("grad_start_step: 7\ngrad_end_step: 5", [], "grad_start_step <= grad_end_step < num_inference_steps"),
    "one setting by two names": (
        "grad_start_step: 1",
        ["mid_timestep=2"],
        "mid_timestep is an alias of grad_start",
    ),
    "options of faces": ("rewards: [{type: face_identity, options: {a: 1}}]", [], "rewards.0.options: unknown setting"),
    "faces of another": (
        "rewards: [{type: 'a:B', embedder: facenet}]",
        [],
        "rewards.0.embedder: unknown setting",
    ),
    "override without value": ("{}", ["lora.rank"], "must be section.name=value"),
    "override of a value": ("{}", ["model=tiny", "model.name=x"], "model is not a section"),
    "override in yaml": ("{}", ["lora.target_modules=[q"], "the value is not valid YAML"),
    "override with a note": (
        "{}",
        ["lora.target_modules=[q] # all"],
        "the value is followed by unexpected text: '# all'",
    ),
    "override in deep sections": ("{}", ["rewards.0.options" + ".a" * 9999 + "=1"], "10001 sections deep"),
    "override of no entry": ("rewards: [{type: sharpness}]", ["rewards.²=1"], "not the index of one of the 1 entries"),
    "no as a number": (
        "{}",
        ["noise_seed=no"],
        "noise_seed: Input should be a valid integer, not false (unquoted yes, no",
    ),
    "yes as a number": ("lora: {rank: yes}", [], "lora.rank: Input should be a valid integer, not true"),
    "a number as a switch": ("overwrite_output_dir: 1", [], "should be a valid boolean, not 1"),
    "text as a number": ("lora: {rank: '8'}", [], 'lora.rank: Input should be a valid integer, not "8"'),
    "a date as a number": ("noise_seed: 2024-01-01", [], 'should be a valid integer, not "2024-01-01"'),
    "no date either": ("noise_seed: 2024-13-45", [], 'should be a valid integer, not "2024-13-45"'),
    "not a number": ("{}", ["noise_seed=0b_"], 'should be a valid integer, not "0b_"'),
    "a number as a path": ("output_dir: 5", [], "output_dir: Input should be text that names a path, not 5"),
    "null": ("lora: {rank: null}", [], "lora.rank: Input should be a valid integer, not null"),
    "text as a list": ("lora: {target_modules: q}", [], 'lora.target_modules: Input should be a list, not "q"'),
    "a number as a key": ("1: 2", [], "1: Keys should be strings"),
    "aliases of aliases": (f"a: &a [x]\nb: [{'*a, ' * 6000}]", [], "more than 10000 values after alias expansion"),
    "an alias of itself": ("rewards: [{options: &a {a: *a}}]", [], "an alias refers to a node that contains it"),
    "deep": ("[" * 9999, [], "nested more than 50 levels deep"),
}


def test_the_names_of_the_reference_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mid_timestep: 2\nfinal_timestep: 5")
    settings = load_run_settings(path, ["final_timestep=6"])
    assert (settings.grad_start_step, settings.grad_end_step) == (2, 6)
    printed = commented_yaml(settings)
    assert "grad_start_step: 2" in printed
    assert "mid_timestep" not in printed
    assert TrainingModuleSettings.parse({"mid_timestep": 1}).grad_start_step == 1


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    text, overrides, said = BAD[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_settings(path, overrides)
    assert said in str(caught.value)


def test_a_path_may_hold_what_yaml_takes_for_its_own() -> None:
    for text in ("runs/exp #3", '"runs/exp #3"', "'runs/exp #3'"):
        assert load_run_settings(None, [f"output_dir={text}"]).output_dir == Path("runs/exp #3")
    assert load_run_settings(None, ["output_dir=2024-01-01"]).output_dir == Path("2024-01-01")
    assert load_run_settings(None, ["model=checkpoints/a: b"]).model == "checkpoints/a: b"


def test_a_section_that_is_commented_out_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    sections = [name for name in RunSettings.model_fields if nested_settings(RunSettings, name)]
    assert len(sections) >= 7
    path.write_text("".join(f"{name}:\n  # all: of it\n" for name in sections))
    assert load_run_settings(path) == RunSettings()
    assert load_run_settings(path, ["lora.rank=4"]).lora.rank == 4
    path.write_text("plan:\n  stages:\nrewards:\nlora:\n  target_modules:\ncache_dir:\nnoise_seed:\n")
    # A setting for which null has a meaning keeps it.
    assert load_run_settings(path) == RunSettings.parse({"noise_seed": None, "cache_dir": None})
    path.write_text("# all: of it\n")
    assert load_run_settings(path) == RunSettings()


def _every_setting() -> dict[str, Any]:
    """Return the annotation of each setting."""
    found = {}
    for name in dotted_names(RunSettings):
        settings: Any = RunSettings()
        *sections, last = name.split(".")
        for section in sections:
            settings = settings[int(section)] if isinstance(settings, tuple) else getattr(settings, section)
        found[name] = type(settings).model_fields[last].annotation
    return found


@pytest.mark.parametrize("name", _every_setting())
def test_no_setting_takes_a_value_of_another_type(name: str) -> None:
    annotation = _every_setting()[name]
    kinds = {annotation, *get_args(annotation)}
    wrong = {"yes": bool, "1": int, "0.5": float, "'1'": str} if kinds & {bool, int, float} else {"5": int, "yes": bool}
    for text, kind in wrong.items():
        if kind in kinds or (kind is int and float in kinds):
            continue
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}\b"):
            load_run_settings(None, [f"{name}={text}"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_run_settings(tmp_path / "run.yaml")


def test_the_printed_page_reads_back_and_explains_every_setting() -> None:
    rewards = [{"type": "a.b:C", "options": {"x": 1}}, {"type": "face_identity", "weight": 0.5}]
    settings = RunSettings.parse({"rewards": rewards, "train": {"learning_rate": 2.5e-6}, "cache_dir": "somewhere"})
    page = commented_yaml(settings)
    assert RunSettings.parse(yaml.safe_load(page)) == settings
    for line in page.splitlines():
        assert not line or "  # " in line, line
        assert "None" not in line.partition("# ")[2]
    assert page.splitlines()[0].startswith("model:")


def test_every_setting_has_its_words() -> None:
    def described(model: Any) -> None:
        for name, field in model.model_fields.items():
            assert field.description or hasattr(field.annotation, "model_fields"), f"{model.__name__}.{name}"

    described(RunSettings)
    for nested in ("lora", "data", "validation", "train", "plan"):
        described(RunSettings.model_fields[nested].annotation)
    for name in (*builtin_names(), "package.module:Class"):
        described(entry_class(name))
    assert len(list(dotted_names(RunSettings))) > 60


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_parse(path: Path) -> None:
    settings = load_run_settings(path)
    assert settings.data.source is not None
    assert settings.model == "tiny" or settings.train.mixed_precision == "bf16"


def test_the_reference_example_has_the_published_settings() -> None:
    settings = load_run_settings(EXAMPLES / "Wan2.2-I2V-A14B.yaml")
    assert (settings.num_inference_steps, settings.grad_start_step, settings.grad_end_step) == (8, 4, 7)
    assert (settings.shift, settings.lora.rank, settings.data.max_pixels) == (5.0, 32, 480 * 480)
    train = settings.train
    assert (train.learning_rate, train.lr_warmup_steps, train.per_device_train_batch_size) == (2.5e-6, 10, 1)


def test_names_of_others_lead_to_settings_that_there_are() -> None:
    assert {*_NAMES_OF_OTHERS.values()} <= {*dotted_names(RunSettings)}
