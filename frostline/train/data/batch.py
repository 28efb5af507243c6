"""The input of `module.forward(data)`: check a batch, then resize it to a size that the model supports."""

import difflib
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from frostline.errors import DataError
from frostline.escaping import is_text
from frostline.models.video_shape import Geometry
from frostline.stages.families import DEFAULT_GEOMETRY

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 16
"""Minimum height and width in pixels."""

RANGE_TOLERANCE = 1e-4
"""Tolerance outside [0, 1] (from resampling or half precision) below which pixel values are clamped."""


@dataclass(frozen=True)
class Batch:
    """A checked batch of B samples.

    Attributes:
        prompt: B strings, none blank.
        video: float32 `(B, T, 3, H, W)` in [0, 1].
        sample_id: B names.
        valid_frames: B numbers, 0 to T; later frames are padding. 0 means a sample without a video.
        reference: for each sample, float32 pictures `(R, 3, h, w)` in [0, 1] of its subject, or None.
        fps: frames per second of each clip; None if unknown.
    """

    prompt: tuple[str, ...]
    video: torch.Tensor
    sample_id: tuple[str, ...]
    valid_frames: tuple[int, ...]
    reference: tuple[torch.Tensor | None, ...]
    fps: tuple[float | None, ...]


def check_batch(data: Any) -> Batch:
    """Check the input of a training step and convert it to a `Batch`.

    Half and double precision are converted to float32. Unknown keys are ignored.

    Args:
        data: a dict with `"prompt": list[str]` of length B and `"video": float (B, T, C, H, W)` in [0, 1]. Optional
            keys: `"sample_id": list[str]`; `"valid_frames": list[int]`, the number of frames of each video that are not
            padding (rewards ignore padding; 0 means that there is no video, only its size); `"reference": list[float
            (R, 3, h, w) in [0, 1] | None]`, pictures of the subject, which rewards use instead of the video; and
            `"fps": list[float | None]`.
    Raises:
        DataError: `data` is invalid; the message names the sample, the field and the remedy.
    """
    if not isinstance(data, dict):
        raise DataError(f"a batch must be a dict with 'prompt' and 'video', not {type(data).__name__}")
    for key in ("prompt", "video"):
        if key not in data:
            raise DataError(_missing_key(key, data))
    video = _check_layout(data["video"])
    count = video.shape[0]
    sample_id = _check_sample_ids(data.get("sample_id"), count)
    prompt = _check_prompts(data["prompt"], count, sample_id)
    valid_frames = _check_valid_frames(data.get("valid_frames"), video.shape[1], sample_id)
    reference = _check_references(data.get("reference"), sample_id)
    fps = _check_fps(data.get("fps"), sample_id)
    return Batch(prompt, _check_pixels(video, sample_id), sample_id, valid_frames, reference, fps)


def fit_to_model(video: torch.Tensor, geometry: Geometry = DEFAULT_GEOMETRY) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Convert float `(B, T, C, H, W)` in [0, 1] to a size that the model supports, and return descriptions of the
    changes.

    T is increased to the next supported number of frames by repeating the last frame; H and W are resized (antialiased)
    to the nearest multiples. The descriptions are empty if nothing was changed; each is logged once per process.
    """
    frames, height, width = video.shape[1], *video.shape[-2:]
    fitted_frames = geometry.fitting_frames(frames)
    fitted_size = geometry.nearest_side(height), geometry.nearest_side(width)
    changes: list[str] = []
    if fitted_size != (height, width):
        video = resize(video, fitted_size)
        fitted = f"{fitted_size[1]}x{fitted_size[0]} (multiples of {geometry.spatial_multiple})"
        changes.append(f"frames of {width}x{height} resized to {fitted}")
    if fitted_frames != frames:
        video = pad_frames(video, fitted_frames, dim=1)
        changes.append(
            f"{frames} frames extended to {fitted_frames} ({geometry.temporal_stride}k+1) by repeating the last"
        )
    for change in changes:
        _log_once(change)
    return video, tuple(changes)


def resize(video: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize the last two dimensions of float `(…, C, H, W)` in [0, 1] to (height, width), antialiased."""
    resized = F.interpolate(video.flatten(0, -4), size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp(0, 1).unflatten(0, video.shape[:-3])


def pad_frames(video: torch.Tensor, frames: int, dim: int) -> torch.Tensor:
    """Extend dimension `dim` to `frames` by repeating its last entry."""
    last = video.narrow(dim, video.shape[dim] - 1, 1)
    return torch.cat([video, last.repeat_interleave(frames - video.shape[dim], dim)], dim)


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that `name` is most likely a typo of, or None."""
    folded = {known.strip().lower(): known for known in names}
    close = difflib.get_close_matches(name.strip().lower(), list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else None


@functools.cache
def _log_once(change: str) -> None:
    logger.warning("video fitted to the model: %s; logged once", change)


def _missing_key(key: str, data: dict[Any, Any]) -> str:
    near = nearest_name(key, [name for name in data if isinstance(name, str)])
    hint = f"; did you mean '{near}'?" if near else f"; it has {sorted(map(str, data)) or 'no keys'}"
    return f"field '{key}' is missing from the batch{hint}"


def _check_sample_ids(sample_id: Any, count: int) -> tuple[str, ...]:
    """Return the names of the samples in messages: the caller's, or their positions."""
    if sample_id is None:
        return tuple(str(index) for index in range(count))
    if not isinstance(sample_id, list | tuple) or not all(isinstance(name, str) for name in sample_id):
        raise DataError("field 'sample_id': must be a list of str")
    if len(sample_id) != count:
        raise DataError(f"field 'sample_id': has {len(sample_id)} entries, but 'video' contains {count} samples")
    return tuple(sample_id)


def _check_valid_frames(valid_frames: Any, frames: int, sample_id: tuple[str, ...]) -> tuple[int, ...]:
    if valid_frames is None:
        return (frames,) * len(sample_id)
    if isinstance(valid_frames, torch.Tensor):
        valid_frames = valid_frames.tolist()
    if not isinstance(valid_frames, list | tuple) or len(valid_frames) != len(sample_id):
        raise DataError(f"field 'valid_frames': must be a list of {len(sample_id)} int, one for each sample")
    for name, count in zip(sample_id, valid_frames, strict=True):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= frames:
            raise DataError(f"sample {name}, field 'valid_frames': must be 0 to {frames}, not {count!r}")
    return tuple(valid_frames)


def _check_references(references: Any, sample_id: tuple[str, ...]) -> tuple[torch.Tensor | None, ...]:
    """Return for each sample float32 pictures (R, 3, h, w) in [0, 1], or None."""
    if references is None:
        return (None,) * len(sample_id)
    if not isinstance(references, list | tuple) or len(references) != len(sample_id):
        raise DataError(
            f"field 'reference': must be a list of {len(sample_id)} entries, one for each sample: pictures "
            "(R, 3, h, w) or None"
        )
    return tuple(
        None if pictures is None else _check_pictures(pictures, name)
        for name, pictures in zip(sample_id, references, strict=True)
    )


def _check_pictures(pictures: Any, name: str) -> torch.Tensor:
    where = f"sample {name}, field 'reference'"
    if not isinstance(pictures, torch.Tensor):
        raise DataError(f"{where}: must be a tensor (R, 3, h, w) or None, not {type(pictures).__name__}")
    shape = tuple(pictures.shape)
    if pictures.ndim != 4 or shape[1] != 3 or shape[0] == 0:
        hint = "; for a single picture use picture.unsqueeze(0)" if pictures.ndim == 3 else ""
        raise DataError(f"{where}: must be one or more pictures (R, 3, h, w), not shape {shape}{hint}")
    if min(shape[2:]) < SMALLEST_SIDE:
        raise DataError(
            f"{where}: pictures of {shape[3]}x{shape[2]} are too small; height and width must be at least "
            f"{SMALLEST_SIDE}"
        )
    if not pictures.is_floating_point():
        raise DataError(f"{where}: must be float in [0, 1], not {pictures.dtype}; if 0 to 255, divide by 255")
    pictures = pictures.to(torch.float32)
    low, high = torch.stack(pictures.aminmax()).tolist()
    _check_range(pictures, low, high, where)
    return pictures.clamp(0, 1) if low < 0 or high > 1 else pictures


def _check_fps(rates: Any, sample_id: tuple[str, ...]) -> tuple[float | None, ...]:
    if rates is None:
        return (None,) * len(sample_id)
    if not isinstance(rates, list | tuple) or len(rates) != len(sample_id):
        raise DataError(f"field 'fps': must be a list of {len(sample_id)} entries, a number or None for each sample")
    for name, rate in zip(sample_id, rates, strict=True):
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate < math.inf):
            raise DataError(f"sample {name}, field 'fps': must be a positive number or None, not {rate!r}")
    return tuple(None if rate is None else float(rate) for rate in rates)


def _check_prompts(prompt: Any, count: int, sample_id: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(prompt, str):
        raise DataError(
            "field 'prompt': must be a list of str, one for each sample; wrap the string in a list: [prompt]"
        )
    if not isinstance(prompt, list | tuple):
        raise DataError(f"field 'prompt': must be a list of str, not {type(prompt).__name__}")
    if len(prompt) != count:
        raise DataError(f"field 'prompt': has {len(prompt)} entries, but 'video' contains {count} samples")
    for name, text in zip(sample_id, prompt, strict=True):
        if not isinstance(text, str):
            raise DataError(f"sample {name}, field 'prompt': must be str, not {type(text).__name__}")
        if not text.strip():
            raise DataError(f"sample {name}, field 'prompt': is empty")
        if not is_text(text):
            raise DataError(f"sample {name}, field 'prompt': contains half of a character (a lone surrogate)")
    return tuple(prompt)


def _check_layout(video: Any) -> torch.Tensor:
    """Return `video` as a tensor `(B, T, 3, H, W)` of any floating-point dtype; values are not checked yet."""
    if isinstance(video, list | tuple):
        raise DataError(f"field 'video': must be one tensor (B, T, C, H, W), not a {_describe_list(video)}")
    if isinstance(video, np.ndarray):
        raise DataError("field 'video': is a numpy array; convert it with torch.from_numpy(video)")
    if not isinstance(video, torch.Tensor):
        raise DataError(f"field 'video': must be a tensor (B, T, C, H, W), not {type(video).__name__}")
    if video.is_nested:
        raise DataError("field 'video': is a nested tensor; bring all samples to one size, then torch.stack(video)")
    if video.layout != torch.strided:
        raise DataError(f"field 'video': has the layout {video.layout}; use video.to_dense()")
    if video.is_meta:
        raise DataError("field 'video': is on the meta device, where tensors have no values")
    shape = tuple(video.shape)
    if video.ndim != 5:
        hint = "; for a single sample use video.unsqueeze(0)" if video.ndim == 4 else ""
        raise DataError(f"field 'video': must have 5 dimensions (B, T, C, H, W), not shape {shape}{hint}")
    if shape[2] != 3:
        raise DataError(f"field 'video': has shape {shape}, but (B, T, C, H, W) needs C = 3{_channel_hint(shape)}")
    if 0 in shape[:2]:
        raise DataError(f"field 'video': has shape {shape}: it contains no {'samples' if shape[0] == 0 else 'frames'}")
    if min(shape[3:]) < SMALLEST_SIDE:
        raise DataError(
            f"field 'video': frames of {shape[4]}x{shape[3]} are too small; "
            f"height and width must be at least {SMALLEST_SIDE}"
        )
    if video.dtype == torch.uint8:
        raise DataError("field 'video': is uint8, 0 to 255; divide it: video.float() / 255")
    if not video.is_floating_point():
        raise DataError(f"field 'video': must be float in [0, 1], not {video.dtype}; if 0 to 255, divide by 255")
    return video


def _describe_list(videos: Sequence[Any]) -> str:
    """Return the most helpful description of a list that was given instead of a batch tensor."""
    shapes = [tuple(video.shape) if hasattr(video, "shape") else None for video in videos]
    for index, shape in enumerate(shapes):
        if shape is not None and shapes[0] is not None and shape != shapes[0]:
            return (
                f"list: sample {index} has shape {shape} and sample 0 {shapes[0]}; use one number of "
                "frames and one size, then torch.stack(video)"
            )
    return "list; use torch.stack(video)"


def _channel_hint(shape: tuple[int, ...]) -> str:
    """Return a hint for a third dimension that does not have 3 channels."""
    if shape[-1] == 3:
        return "; channels are last: use video.permute(0, 1, 4, 2, 3)"
    if shape[1] == 3:
        return "; channels come before frames: use video.transpose(1, 2)"
    if shape[2] == 1:
        return "; for grey frames use video.expand(-1, -1, 3, -1, -1)"
    if shape[2] == 4:
        return "; drop the alpha channel: video[:, :, :3]"
    return ""


def _check_pixels(video: torch.Tensor, sample_id: tuple[str, ...]) -> torch.Tensor:
    """Return `video` as float32, with every value finite and in [0, 1]; values within the tolerance are clamped."""
    video = video.to(torch.float32)
    # A valid batch needs one pass and one synchronisation with the device: NaN propagates to both ends of its sample's
    # range.
    low, high = torch.stack(video.flatten(1).aminmax(dim=1)).tolist()
    for index, name in enumerate(sample_id):
        _check_range(video[index], low[index], high[index], f"sample {name}, field 'video'")
    return video.clamp(0, 1) if min(low) < 0 or max(high) > 1 else video


def _check_range(frames: torch.Tensor, low: float, high: float, where: str) -> None:
    """Check that (T, C, H, W) frames with values from `low` to `high` are finite and in [0, 1]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        frame = int((~torch.isfinite(frames.flatten(1))).any(dim=1).nonzero()[0])
        raise DataError(f"{where}: NaN or infinite pixels, first in frame {frame}")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise DataError(f"{where}: values from {low:.4g} to {high:.4g}, but must be in [0, 1]{_range_hint(low, high)}")


def _range_hint(low: float, high: float) -> str:
    """Return a hint for values outside [0, 1], depending on their range."""
    if low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
        return "; if they are in [-1, 1], use (video + 1) / 2"
    if low >= 0 and 2 < high <= 255:
        return "; if they are 0 to 255, divide by 255"
    return "; clamp or rescale them"
