"""What a run records about its settings: those that are not the defaults, including entries of lists."""

from frostline.train.config_file import dump_settings
from frostline.train.flatten import flatten
from frostline.train.run_facts import changed_from_defaults
from frostline.train.settings import RunSettings


def test_only_settings_with_other_values_are_changed() -> None:
    settings = RunSettings.parse(
        {
            "output_dir": "runs/my",
            "data": {"source": "clips", "num_frames": 9},
            "lora": {"rank": 4, "alpha": None},
            "train": {"learning_rate": 0.5},
            "validation": {"judges": [{"type": "face_identity", "embedder": "dlib"}, {"type": "sharpness"}]},
        }
    )
    changed = [*changed_from_defaults(settings)]
    assert {"data.source", "data.num_frames", "lora.rank", "train.learning_rate"} <= {*changed}
    assert {name for name in changed if name.startswith("validation.")} == {
        "validation.judges.0.type",
        "validation.judges.0.embedder",
        "validation.judges.1.type",
    }
    # The rewards are the default ones, and `null` is the default of alpha.
    assert not any(name.startswith(("rewards", "lora.alpha", "train.seed")) for name in changed)
    # The names are those of a flattened configuration.
    assert {*changed} <= flatten(dump_settings(settings)).keys()
