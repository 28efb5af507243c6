"""The report: its numbers are on the page, and a real browser shows and sorts them."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from browser import needs_chromium, render

from frostline.score.pictures import ReferencePictures, extreme_pictures
from frostline.score.report import write_score_report
from frostline.score.result import VideoScore
from frostline.score.run import ScoreOutcome
from frostline.score.settings import ScoreSettings
from frostline.score.summary import summarize

ScoreFiles = Callable[..., tuple[VideoScore, ...]]

SETTINGS = ScoreSettings(detector="yunet")


@pytest.fixture
def rows(people: Path, score_files: ScoreFiles) -> tuple[VideoScore, ...]:
    names = ("astronaut", "half", "hopper", "nobody", "<absent>&")
    return score_files([people / f"{name}.mp4" for name in names], people / "face.png")


@pytest.fixture
def page(rows: tuple[VideoScore, ...], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_score_report(path, ScoreOutcome(rows, summarize(rows, 2.0, 40, {"face_detector (torch)": 1.5})), SETTINGS)
    return path


def test_every_number_is_on_the_page(page: Path, rows: tuple[VideoScore, ...]) -> None:
    html = page.read_text(encoding="utf-8")
    text = unescape(re.sub(r"<[^>]+>", " ", html))
    folder = f"{Path(rows[0].video).parent}/"
    assert text.count(f"Videos in {folder}") == 1 and folder not in text.replace(f"Videos in {folder}", "")
    for row in rows:
        assert Path(row.video).name in text
        if row.face_score is not None:
            assert f"{row.face_score:.3f}" in text
            assert f"{row.worst_frame_score:.3f} at {row.worst_frame}" in text
            assert f"Best: {row.best_frame_score:.3f} at frame {row.best_frame}" in text
    assert "50.0 %" in text and "no such file" in text and "no face was found" in text
    assert "4 of 5" in " ".join(text.split())
    # The worst and the best frame of three videos with faces, and the face of the reference at the top.
    assert html.count("data:image/jpeg") == 7
    assert html.index("The face of face.png") < html.index("All scores")
    # At SFace's threshold, two of four videos pass; the missing video is not counted.
    assert "The same person in 2 of 4 videos; 1 without any face (mean cosine of at least 0.363" in " ".join(
        text.split()
    )
    assert text.index("The same person in") < text.index("The mean face score")
    # 40 frames in 2 s, most of which loading took, so the speed is not shown.
    assert "frames/s" not in text
    assert "<absent>" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_several_references_stand_beside_their_videos(
    rows: tuple[VideoScore, ...], people: Path, tmp_path: Path
) -> None:
    other = rows[2].model_copy(update={"reference": str(people / "hopper.mp4")})
    page = tmp_path / "pairs.html"
    write_score_report(page, ScoreOutcome((rows[0], other), summarize([rows[0], other])), SETTINGS)
    html = page.read_text(encoding="utf-8")
    assert html.index("Frame by frame") < html.index("The face of face.png") < html.index("The face of hopper.mp4")


def test_the_face_of_a_reference_is_found_or_left_out(people: Path) -> None:
    faces = SETTINGS.faces
    assert faces is not None
    pictures = ReferencePictures(faces)
    assert (pictures.face(str(people / "face.png")) or b"")[:2] == b"\xff\xd8"
    assert pictures.face(str(people / "hopper.mp4")) is not None
    assert pictures.face(str(people / "nobody.mp4")) is None
    assert pictures.face("gone.png") is None


@pytest.mark.parametrize(("lowest", "first_tick"), [(0.1, "0"), (-0.15, "\N{MINUS SIGN}0.2")])
def test_scores_of_faces_have_one_axis(
    rows: tuple[VideoScore, ...], tmp_path: Path, lowest: float, first_tick: str
) -> None:
    row = rows[0].model_copy(update={"face_score": 0.3, "frame_scores": (lowest, 0.4), "frame_numbers": (0, 1)})
    write_score_report(tmp_path / "a.html", ScoreOutcome((row,), summarize([row])), SETTINGS)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    plot = html.partition("Number of videos by face score")[2].partition("</svg>")[0]
    words = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
    assert words[0] == first_tick and "1" in words and "threshold 0.363" in words


def test_a_gap_breaks_the_curve(
    page: Path, rows: tuple[VideoScore, ...], people: Path, score_files: ScoreFiles
) -> None:
    """Draw two strokes for a face, no face and a face, and one for a face in every frame."""

    def strokes(row: VideoScore) -> int:
        write_score_report(page, ScoreOutcome((row,), summarize([row])), SETTINGS)
        curve = page.read_text().partition(f"Score of each frame of {row.video}")[2].partition("</svg>")[0]
        return len(re.findall(r"stroke: var\(--plot-1", curve))

    whole = rows[0]
    scores = list(whole.frame_scores or ())
    broken = whole.model_copy(update={"frame_scores": (*scores[:2], None, *scores[3:])})
    assert strokes(broken) == strokes(whole) + 1 == 2


def test_pictures_show_the_face_with_box_and_landmarks(rows: tuple[VideoScore, ...]) -> None:
    import io

    import numpy as np
    from PIL import Image

    worst, best = extreme_pictures(rows[1], every=1)
    assert (worst.which, worst.number, best.which, best.number) == (
        "worst",
        rows[1].worst_frame,
        "best",
        rows[1].best_frame,
    )
    picture = np.asarray(Image.open(io.BytesIO(best.jpeg)).convert("RGB")).astype(int)
    assert picture.shape == (320, 320, 3)
    blue = (abs(picture - (98, 181, 229)).sum(axis=2) < 90).sum()
    assert blue > 300, "the box must be drawn"
    assert extreme_pictures(rows[3], every=1) == [] == extreme_pictures(rows[4], every=1)
    gone = rows[0].model_copy(update={"video": "gone.mp4"})
    assert extreme_pictures(gone, every=1) == []


def test_a_long_video_stays_a_small_plot(rows: tuple[VideoScore, ...], tmp_path: Path) -> None:
    scores = tuple(None if 5000 < t < 6000 else 0.5 + 0.4 * (t % 2) for t in range(18000))
    long = rows[0].model_copy(update={"frame_numbers": tuple(range(18000)), "frame_scores": scores})
    write_score_report(tmp_path / "long.html", ScoreOutcome((long,), summarize([long])), SETTINGS)
    html = (tmp_path / "long.html").read_text()
    assert "Each point is the mean of up to 30 frames" in html
    assert len(html) < 300_000


@needs_chromium
def test_a_browser_shows_and_sorts_the_scores(page: Path, rows: tuple[VideoScore, ...], tmp_path: Path) -> None:
    # The policy would prevent the test's own script from running.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text(encoding="utf-8"))
    script = """<script>
      const cells = (n) => [...document.querySelectorAll(`td:nth-child(${n})`)].map((cell) => cell.textContent).join();
      document.querySelectorAll("th button")[1].click();
      const images = [...document.images].filter((image) => image.complete && image.naturalWidth === 320).length;
      const scroll = document.querySelector(".table .scroll");
      const fits = scroll.scrollWidth <= scroll.clientWidth ? "fits" : "is cut";
      const plots = document.querySelectorAll(".plot svg").length;
      document.title = `${cells(2)} | ${images} pictures | ${plots} plots | ${fits}`;
    </script></body>"""
    path = tmp_path / "opened.html"
    path.write_text(html.replace("</body>", script), encoding="utf-8")
    dom, _ = render(path, tmp_path / "profile")
    found = sorted(row.face_score for row in rows if row.face_score is not None)
    order = ",".join([*(f"{score:.3f}" for score in found), "\N{EN DASH}", "\N{EN DASH}"])
    # At a width of 1280 pixels, the last column is visible.
    assert f"<title>{order} | 7 pictures | 6 plots | fits</title>" in dom
