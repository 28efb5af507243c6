"""Fixtures: videos of the faces of two public-domain people."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from score_videos import SIZE, moving, portrait

from frostline.progress import Progress
from frostline.score.request import Pair
from frostline.score.result import VideoScore
from frostline.score.run import RunOptions, run_score
from frostline.score.settings import ScoreSettings
from frostline.video import write_video


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `face.png` (the astronaut), `astronaut.mp4`, `hopper.mp4`, `nobody.mp4`, `half.mp4`; return the folder."""
    folder = tmp_path_factory.mktemp("people")
    Image.fromarray(portrait("astronaut", 240)).save(folder / "face.png")
    for person in ("astronaut", "hopper"):
        write_video(folder / f"{person}.mp4", moving(person), lossless=True)
    nobody = torch.full((5, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    write_video(folder / "nobody.mp4", nobody, lossless=True)
    write_video(folder / "half.mp4", torch.cat([moving("astronaut", 3), nobody[:3]]), lossless=True)
    return folder


ScoreFiles = Callable[..., tuple[VideoScore, ...]]


@pytest.fixture
def score_files() -> ScoreFiles:
    """`score_files(videos, reference, out=…, resume=…, **settings)`: score in this process; return the rows."""

    def score(
        videos: Sequence[Path | str],
        reference: Path | str,
        *,
        out: Path | None = None,
        resume: bool = False,
        overwrite: bool | None = None,
        batch: int = 32,
        backend: str = "torch",
        engines: Path = Path("engines"),
        **settings: object,
    ) -> tuple[VideoScore, ...]:
        pairs = [Pair(index, str(video), str(reference)) for index, video in enumerate(videos)]
        replaces = not resume if overwrite is None else overwrite
        options = RunOptions(
            out=out, resume=resume, overwrite=replaces, backend=backend, device="cpu", engines=engines, batch=batch
        )
        outcome = run_score(pairs, ScoreSettings.parse({"detector": "yunet", **settings}), options, Progress())
        assert outcome is not None
        return outcome.rows

    return score
