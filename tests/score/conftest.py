"""Videos of faces, made by the tests: two public-domain people, every fault that files can have."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from frostline.progress import Progress
from frostline.score.request import Pair
from frostline.score.result import VideoScore
from frostline.score.run import RunOptions, run_score
from frostline.score.settings import ScoreSettings
from frostline.video import write_video

SIZE = 160


def portrait(person: str, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8 of the astronaut or the admiral."""
    if person == "astronaut":
        image = Image.fromarray(skimage.data.astronaut()).crop((104, 0, 344, 240))
    else:
        path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        image = Image.open(path).convert("RGB").crop((40, 10, 490, 460))
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))


def moving(person: str, frames: int = 5, size: int = SIZE) -> Tensor:
    """(frames, 3, size, size) uint8 of a drifting, flickering portrait."""
    picture = portrait(person, size)
    pictures = [np.roll(picture, (t % 5, -(t % 7)), axis=(0, 1)) * (0.85 + 0.03 * (t % 5)) for t in range(frames)]
    return torch.from_numpy(np.stack(pictures).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `face.png` (the astronaut), `astronaut.mp4`, `hopper.mp4`, `nobody.mp4`, `half.mp4`."""
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
    """`score_files(videos, reference, out=…, resume=…, batch=…, backend=…, engines=…, **settings)` in this process."""

    def score(
        videos: Sequence[Path | str],
        reference: Path | str,
        *,
        out: Path | None = None,
        resume: bool = False,
        batch: int = 32,
        backend: str = "torch",
        engines: Path = Path("engines"),
        **settings: object,
    ) -> tuple[VideoScore, ...]:
        pairs = [Pair(index, str(video), str(reference)) for index, video in enumerate(videos)]
        options = RunOptions(out, resume, backend, "cpu", engines, batch)
        outcome = run_score(pairs, ScoreSettings.parse({"detector": "yunet", **settings}), options, Progress())
        assert outcome is not None
        return outcome.rows

    return score
