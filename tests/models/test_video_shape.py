"""The sizes of videos that models accept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.errors import ConfigError
from frostline.models.video_shape import Geometry, nearest_multiple

GEOMETRIES = st.builds(Geometry, st.integers(1, 8), st.sampled_from([4, 8, 16]), st.sampled_from([16, 32]))


def test_nearest_multiple() -> None:
    assert [nearest_multiple(size, 16) for size in (1, 16, 23, 24, 39, 40, 480)] == [16, 16, 16, 32, 32, 48, 480]
    assert [nearest_multiple(size, 32) for size in (1, 47, 48, 79, 80, 480)] == [32, 32, 64, 64, 96, 480]


@given(GEOMETRIES, st.integers(1, 200))
def test_frames_and_latent_frames_are_each_others_inverse(geometry: Geometry, latent_frames: int) -> None:
    frames = geometry.num_frames(latent_frames)
    geometry.check_frames(frames)
    assert geometry.latent_grid(frames, 64, 96)[0] == latent_frames
    assert geometry.fitting_frames(frames) == frames


@given(GEOMETRIES, st.integers(1, 500))
def test_the_fitting_number_of_frames_is_the_next_that_the_model_takes(geometry: Geometry, frames: int) -> None:
    fitting = geometry.fitting_frames(frames)
    geometry.check_frames(fitting)
    assert frames <= fitting < frames + geometry.temporal_stride


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"num_frames": 8}, r"num_frames must be 8k\+1 \(1, 9, 17, …\), not 8"),
        ({"height": 48}, "height and width must be set together"),
        ({"height": 48, "width": 64}, "height must be a multiple of 32, not 48"),
        ({"max_pixels": 1000}, "max_pixels must be at least 1024, not 1000"),
        ({"frame_stride": 0}, "frame_stride must be at least 1, not 0"),
    ],
)
def test_what_a_model_does_not_take_is_refused(cut: dict[str, int], message: str) -> None:
    usual = {"num_frames": 9, "height": None, "width": None, "max_pixels": 4096, "frame_stride": 1}
    with pytest.raises(ConfigError, match=message):
        Geometry(8, 16, 32).check_cut(**{**usual, **cut})  # type: ignore[arg-type]
