"""The batches that `module.forward(data)` accepts: every error names the sample, the field and what to do."""

import logging

import numpy as np
import pytest
import torch

from frostline.errors import DataError
from frostline.models.video_shape import Geometry
from frostline.train.data import batch as batch_module
from frostline.train.data.batch import Batch, check_batch, fit_to_model


def good(count: int = 2, **changes: object) -> dict[str, object]:
    """Return a valid batch, with some entries changed."""
    video = torch.full((count, 5, 3, 16, 32), 0.5)
    return {"prompt": [f"clip {index}" for index in range(count)], "video": video, **changes}


def video_with(value: float, sample: int = 1, frame: int = 3) -> torch.Tensor:
    """Return a valid video of two samples, with one pixel changed."""
    video = torch.full((2, 5, 3, 16, 32), 0.5)
    video[sample, frame, 1, 7, 9] = value
    return video


def without(key: str, **instead: object) -> dict[str, object]:
    data = good()
    del data[key]
    return {**data, **instead}


BAD_BATCHES = {
    "a list": ([good()], ["must be a dict", "list"]),
    "None": (None, ["must be a dict", "NoneType"]),
    "no keys": ({}, ["'prompt' is missing", "no keys"]),
    "prompts": (without("prompt", prompts=["a", "b"]), ["'prompt' is missing", "did you mean 'prompts'?"]),
    "Video": (without("video", Video=torch.zeros(2)), ["'video' is missing", "did you mean 'Video'?"]),
    "no near key": (without("video", pixels=1), ["'video' is missing", "it has ['pixels', 'prompt']"]),
    "bare prompt": (good(prompt="a clip"), ["'prompt'", "[prompt]"]),
    "prompt None": (good(prompt=None), ["'prompt'", "list of str, not NoneType"]),
    "prompt of int": (good(prompt=["a", 3]), ["sample 1", "'prompt'", "must be str, not int"]),
    "valid_frames too many": (good(valid_frames=[1, 99]), ["sample 1", "'valid_frames'", "must be 0 to 5, not 99"]),
    "valid_frames negative": (good(valid_frames=[-1, 1]), ["sample 0", "'valid_frames'", "not -1"]),
    "valid_frames bool": (good(valid_frames=[True, 1]), ["sample 0", "'valid_frames'", "not True"]),
    "valid_frames one": (good(valid_frames=[1]), ["'valid_frames'", "list of 2 int"]),
    "valid_frames number": (good(valid_frames=3), ["'valid_frames'", "list of 2 int"]),
    "prompt half a character": (good(prompt=["a \ud83d", "b"]), ["sample 0", "'prompt'", "lone surrogate"]),
    "prompt empty": (good(prompt=["", "b"]), ["sample 0", "'prompt'", "is empty"]),
    "prompt blank": (good(prompt=["a", " \n"], sample_id=["x.mp4", "y.mp4"]), ["sample y.mp4", "'prompt'"]),
    "too few prompts": (good(prompt=["a"]), ["'prompt'", "1 entries", "2 samples"]),
    "no prompts": (good(prompt=[]), ["'prompt'", "0 entries"]),
    "ids of int": (good(sample_id=[1, 2]), ["'sample_id'", "list of str"]),
    "too many ids": (good(sample_id=["a", "b", "c"]), ["'sample_id'", "3 entries", "2 samples"]),
    "reference of one": (good(reference=torch.rand(2, 3, 16, 16)), ["'reference'", "a list of 2 entries"]),
    "too few references": (good(reference=[None]), ["'reference'", "a list of 2 entries"]),
    "reference path": (good(reference=[None, "a.png"]), ["sample 1", "'reference'", "or None, not str"]),
    "reference picture": (good(reference=[torch.rand(3, 16, 16), None]), ["sample 0", "picture.unsqueeze(0)"]),
    "reference grey": (good(reference=[torch.rand(1, 1, 16, 16), None]), ["sample 0", "not shape (1, 1, 16, 16)"]),
    "no reference": (good(reference=[None, torch.rand(0, 3, 16, 16)]), ["sample 1", "one or more pictures"]),
    "reference small": (good(reference=[None, torch.rand(1, 3, 8, 32)]), ["sample 1", "32x8 are too small", "16"]),
    "reference uint8": (good(reference=[torch.zeros(1, 3, 16, 16).byte(), None]), ["sample 0", "divide by 255"]),
    "reference NaN": (good(reference=[torch.full((1, 3, 16, 16), torch.nan), None]), ["sample 0", "NaN"]),
    "reference range": (
        good(reference=[None, torch.full((1, 3, 16, 16), -1.0)], sample_id=["x", "y"]),
        ["sample y, field 'reference'", "from -1 to -1", "(video + 1) / 2"],
    ),
    "one fps": (good(fps=16.0), ["'fps'", "a list of 2 entries"]),
    "no rate": (good(fps=[16.0, 0]), ["sample 1", "'fps'", "positive number or None, not 0"]),
    "fps of text": (good(fps=["16", None]), ["sample 0", "'fps'", "not '16'"]),
    "numpy": (good(video=np.zeros((2, 5, 3, 16, 32))), ["'video'", "torch.from_numpy"]),
    "None video": (good(video=None), ["'video'", "NoneType"]),
    "path": (good(video="a.mp4"), ["'video'", "str"]),
    "list": (good(video=[torch.zeros(5, 3, 16, 32)] * 2), ["'video'", "torch.stack(video)"]),
    "unequal list": (
        good(video=[torch.zeros(5, 3, 16, 32), torch.zeros(5, 3, 32, 32)]),
        ["'video'", "sample 1 has shape (5, 3, 32, 32) and sample 0 (5, 3, 16, 32)"],
    ),
    "meta": (good(video=torch.zeros(2, 5, 3, 16, 32, device="meta")), ["'video'", "meta device", "no values"]),
    "sparse": (
        good(video=torch.zeros(2, 5, 3, 16, 32).to_sparse()),
        ["'video'", "torch.sparse_coo", "video.to_dense()"],
    ),
    "nested": (
        good(video=torch.nested.nested_tensor([torch.zeros(5, 3, 16, 32)] * 2)),
        ["'video'", "nested tensor", "torch.stack(video)"],
    ),
    "four dimensions": (good(video=torch.zeros(5, 3, 16, 32)), ["'video'", "video.unsqueeze(0)"]),
    "three dimensions": (good(video=torch.zeros(3, 16, 32)), ["'video'", "5 dimensions", "(3, 16, 32)"]),
    "channels last": (good(video=torch.zeros(2, 5, 16, 32, 3)), ["'video'", "permute(0, 1, 4, 2, 3)"]),
    "channels first": (good(video=torch.zeros(2, 3, 5, 16, 32)), ["'video'", "transpose(1, 2)"]),
    "grey": (good(video=torch.zeros(2, 5, 1, 16, 32)), ["'video'", "expand(-1, -1, 3, -1, -1)"]),
    "alpha": (good(video=torch.zeros(2, 5, 4, 16, 32)), ["'video'", "video[:, :, :3]"]),
    "latents": (good(video=torch.zeros(2, 5, 16, 16, 32)), ["'video'", "C = 3"]),
    "no samples": (good(video=torch.zeros(0, 5, 3, 16, 32)), ["'video'", "no samples"]),
    "no frames": (good(video=torch.zeros(2, 0, 3, 16, 32)), ["'video'", "no frames"]),
    "too small": (good(video=torch.zeros(2, 5, 3, 15, 32)), ["'video'", "32x15 are too small", "16"]),
    "uint8": (good(video=torch.zeros(2, 5, 3, 16, 32, dtype=torch.uint8)), ["'video'", "video.float() / 255"]),
    "int64": (good(video=torch.zeros(2, 5, 3, 16, 32, dtype=torch.int64)), ["'video'", "torch.int64", "255"]),
    "bool": (good(video=torch.zeros(2, 5, 3, 16, 32, dtype=torch.bool)), ["'video'", "torch.bool"]),
    "complex": (good(video=torch.zeros(2, 5, 3, 16, 32, dtype=torch.cfloat)), ["'video'", "torch.complex64"]),
    "NaN": (good(video=video_with(torch.nan)), ["sample 1", "'video'", "NaN", "frame 3"]),
    "inf": (good(video=video_with(torch.inf, 0, 2)), ["sample 0", "'video'", "infinite", "frame 2"]),
    "-inf": (good(video=video_with(-torch.inf), sample_id=["x", "y"]), ["sample y", "'video'", "frame 3"]),
    "0 to 255": (good(video=video_with(254.0)), ["sample 1", "'video'", "to 254", "divide by 255"]),
    "-1 to 1": (good(video=video_with(-0.9)), ["sample 1", "'video'", "from -0.9", "(video + 1) / 2"]),
    "a little above": (good(video=video_with(1.01)), ["sample 1", "'video'", "to 1.01", "clamp"]),
    "normalised": (good(video=video_with(-2.1)), ["sample 1", "'video'", "from -2.1", "rescale"]),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(name: str) -> None:
    data, fragments = BAD_BATCHES[name]
    with pytest.raises(DataError) as caught:
        check_batch(data)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_good_batch_passes_unchanged() -> None:
    data = good(3, extra="left alone")
    checked = check_batch(data)
    assert isinstance(checked, Batch)
    assert checked.prompt == ("clip 0", "clip 1", "clip 2")
    assert checked.sample_id == ("0", "1", "2")
    assert checked.video is data["video"]
    assert check_batch(good(sample_id=("a", "b"))).sample_id == ("a", "b")


def test_references_and_rates_are_optional_for_each_sample() -> None:
    checked = check_batch(good())
    assert (checked.reference, checked.fps, checked.valid_frames) == ((None, None), (None, None), (5, 5))
    pictures = torch.rand(3, 3, 40, 24)
    checked = check_batch(good(reference=[None, pictures], fps=[24, None], valid_frames=[0, 5]))
    assert checked.reference[0] is None and checked.reference[1] is pictures
    assert (checked.fps, checked.valid_frames) == ((24.0, None), (0, 5))
    half = check_batch(good(reference=[pictures.half(), 1.00005 * torch.ones(1, 3, 16, 16)])).reference
    assert half[0] is not None and half[0].dtype == torch.float32
    assert half[1] is not None and half[1].max() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype) -> None:
    video = check_batch(good(video=torch.rand(2, 5, 3, 16, 32).to(dtype))).video
    assert video.dtype == torch.float32


def test_strays_within_the_tolerance_are_clamped() -> None:
    video = video_with(1.00005)
    video[0, 0, 0, 0, 0] = -0.00005
    checked = check_batch(good(video=video)).video
    assert checked.min() == 0
    assert checked.max() == 1
    assert video.max() > 1, "the caller's tensor must not change"


@pytest.mark.parametrize(
    ("frames", "height", "width", "fitted"),
    [
        (1, 16, 16, (1, 16, 16)),
        (5, 32, 48, (5, 32, 48)),
        (2, 16, 16, (5, 16, 16)),
        (16, 32, 32, (17, 32, 32)),
        (6, 23, 24, (9, 16, 32)),
        (4, 17, 250, (5, 16, 256)),
    ],
)
def test_fit_to_model(frames: int, height: int, width: int, fitted: tuple[int, int, int]) -> None:
    video = torch.rand(2, frames, 3, height, width)
    result, changes = fit_to_model(video)
    assert result.shape == (2, fitted[0], 3, *fitted[1:])
    assert len(changes) == (fitted[0] != frames) + (fitted[1:] != (height, width))
    assert result.min() >= 0
    assert result.max() <= 1
    assert all(torch.equal(result[:, t], result[:, frames - 1]) for t in range(frames, fitted[0]))
    if not changes:
        assert result is video
    if fitted[1:] == (height, width):
        assert torch.equal(result[:, :frames], video)
    torch.testing.assert_close(result[1:], fit_to_model(video[1:])[0])


def test_fitting_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    batch_module._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, changes = fit_to_model(torch.rand(1, 16, 3, 250, 256))
    assert len(changes) == 2
    assert len(caplog.records) == 2
    assert "256x250 resized to 256x256" in caplog.text
    assert "16 frames extended to 17" in caplog.text


def test_a_model_of_coarser_latents_wants_multiples_of_32() -> None:
    fitted, changes = fit_to_model(torch.rand(1, 5, 3, 48, 96), Geometry(4, 16, 32))
    assert fitted.shape == (1, 5, 3, 64, 96)
    assert "96x48 resized to 96x64 (multiples of 32)" in changes[0]
