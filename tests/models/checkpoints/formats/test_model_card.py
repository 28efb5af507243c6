"""The licence that a model card states."""

from pathlib import Path

import pytest

from frostline.models.checkpoints.formats.model_card import stated_license


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        ("---\nlicense: apache-2.0\n---\n# Wan", "apache-2.0"),
        ("---\nlicense: [one, two]\n---\n", None),
        ("---\nlicense: '\n---\n", None),
        ("# Wan", None),
    ],
)
def test_the_licence_is_read_from_the_folder_or_its_parent(card: str, stated: str | None, tmp_path: Path) -> None:
    weights = tmp_path / "model" / "high_noise_model" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    assert stated_license(weights) is None
    (tmp_path / "model" / "README.md").write_text(card)
    assert stated_license(weights) == stated


def test_a_card_that_cannot_be_read_states_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError("no access")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert stated_license(tmp_path / "weights.safetensors") is None
