"""Render clips of two public-domain faces in motion, the training data of the tiny model.

The two photographs are part of wheels: `skimage.data.astronaut()` (NASA) and matplotlib's `grace_hopper.jpg` (US Navy).
Each clip shows one of the two people with the motion of its prompt, from a random pose. In a clip with drift, the face
gradually changes to the other person's, like the identity drift of real video models.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PROMPTS = (
    "a person turns the head to the left",
    "a person turns the head to the right",
    "a person nods",
    "a person moves closer to the camera",
    "a person talks and smiles",
)
PEOPLE = ("astronaut", "hopper")
NUM_FRAMES = 9
SIZE = 96

_PORTRAIT_SIZE = 256
# Face centre (x, y) and face height in pixels of each photograph.
_FACES = {"astronaut": (224, 117, 110), "hopper": (265, 230, 221)}
# Eyes, nose and corners of the mouth (x, y) of each portrait, in [-1, 1].
_LANDMARKS = {
    "astronaut": ((-0.166, -0.127), (0.213, -0.106), (0.018, 0.111), (-0.176, 0.206), (0.198, 0.220)),
    "hopper": ((-0.189, -0.159), (0.194, -0.180), (0.017, 0.031), (-0.135, 0.207), (0.180, 0.193)),
}
# The region that drifts: an ellipse around the face, with centre (x, y), radii, and width of the soft edge in radii.
_FACE_CENTRE, _FACE_RADII, _FACE_EDGE = (0.02, 0.04), (0.40, 0.52), 0.3
# Half-width of the view in units of half a portrait: the face fills about 70 % of the frame height.
_VIEW = 0.66
# Rendering at twice the size and averaging 2×2 keeps fine detail from aliasing as the face moves.
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Clips:
    """A batch of rendered clips.

    Attributes:
        video: (B, T, 3, H, W) float32 in [0, 1].
        prompt: (B,) int64, index into `PROMPTS`.
        person: (B,) int64, index into `PEOPLE`.
    """

    video: Tensor
    prompt: Tensor
    person: Tensor

    @property
    def prompts(self) -> list[str]:
        return [PROMPTS[index] for index in self.prompt.tolist()]


@functools.cache
def portraits() -> Tensor:
    """Return the portraits of the two people, (2, 3, 256, 256) in [0, 1]: centred faces of 0.48 of the height."""
    return torch.stack([_portrait(person) for person in PEOPLE])


def render_clips(
    count: int,
    generator: torch.Generator,
    *,
    num_frames: int = NUM_FRAMES,
    size: int = SIZE,
    prompt: Tensor | None = None,
    person: Tensor | None = None,
    only_frame: int | None = None,
    drift: Tensor | None = None,
) -> Clips:
    """Render `count` random clips.

    Args:
        count: B.
        num_frames: T.
        size: height and width in pixels.
        prompt, person: (B,) int64, the content of the clips; random by default.
        only_frame: render only this frame (T = 1).
        drift: (B,) in [0, 1], the weight of the other person's face in the last frame; the weight starts at 0 and rises
            with decreasing speed. By default, there is no drift.
    """
    if prompt is None:
        prompt = torch.randint(0, len(PROMPTS), (count,), generator=generator)
    if person is None:
        person = torch.randint(0, len(PEOPLE), (count,), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    pose = _motion(prompt, num_frames, generator)
    if drift is not None:
        pose["drift"] = drift[:, None] * torch.sin(torch.linspace(0, math.pi / 2, num_frames))
    if only_frame is not None:
        pose = {name: track[:, only_frame : only_frame + 1] for name, track in pose.items()}
    source = _oriented(portraits()[person], mirrored)
    target = None if drift is None else _oriented(_swapped_faces()[person], mirrored)
    return Clips(_render(source, target, pose, size), prompt, person)


def held_out_clips(count: int, seed: int, *, num_frames: int = NUM_FRAMES, size: int = SIZE) -> Clips:
    """Return clips for evaluation, with random poses from `seed`, that cover all prompts and both people evenly."""
    index = torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    prompt, person = index % len(PROMPTS), (index // len(PROMPTS)) % len(PEOPLE)
    return render_clips(count, generator, num_frames=num_frames, size=size, prompt=prompt, person=person)


def _photograph(person: str) -> np.ndarray:
    if person == "astronaut":
        import skimage.data

        return skimage.data.astronaut()
    import matplotlib
    from PIL import Image

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(Image.open(path).convert("RGB"))


def _portrait(person: str) -> Tensor:
    x, y, face_height = _FACES[person]
    side = int(face_height * 2.1)
    image = torch.from_numpy(_photograph(person).copy()).permute(2, 0, 1)[None].float() / 255
    image = F.pad(image, (side, side, side, side), mode="replicate")
    left, top = int(x + side / 2), int(y + side / 2)
    crop = image[:, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, (_PORTRAIT_SIZE, _PORTRAIT_SIZE), mode="bicubic", antialias=True)
    return crop[0].clamp(0, 1)


def _oriented(source: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored[:, None, None, None], source.flip(-1), source)


@functools.cache
def _swapped_faces() -> Tensor:
    """Return the portraits with the faces swapped, with eyes and mouth aligned."""
    own, other = portraits(), portraits().flip(0)
    points = torch.tensor([_LANDMARKS[person] for person in PEOPLE])
    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    to_other = torch.linalg.lstsq(points, points.flip(0)[..., :2]).solution.transpose(1, 2)
    moved = F.grid_sample(
        other, F.affine_grid(to_other, [*own.shape], align_corners=False), padding_mode="border", align_corners=False
    )
    axis = torch.linspace(-1, 1, _PORTRAIT_SIZE) * (1 - 1 / _PORTRAIT_SIZE)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    (x, y), (width, height) = _FACE_CENTRE, _FACE_RADII
    radius = (((column - x) / width) ** 2 + ((row - y) / height) ** 2).sqrt()
    return torch.lerp(own, moved, ((1 - radius) / _FACE_EDGE).clamp(0, 1))


def _motion(prompt: Tensor, num_frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the pose over time, each value (B, T): a random, nearly frontal pose, then the motion of the prompt."""
    count = len(prompt)
    time = torch.linspace(0, 1, num_frames)[None]
    ease = 3 * time**2 - 2 * time**3

    def uniform(scale: float) -> Tensor:
        return scale * (2 * torch.rand(count, 1, generator=generator) - 1)

    def doing(index: int) -> Tensor:
        return (prompt == index).float()[:, None]

    strength = 0.7 + 0.3 * torch.rand(count, 1, generator=generator)
    left, right, nod, closer, talk = (doing(index) for index in range(len(PROMPTS)))
    turn = strength * ease * (right - left)
    nodding = strength * nod
    tilt = torch.sign(uniform(1.0))
    return {
        "x": uniform(0.05) + 0.13 * turn,
        "y": uniform(0.05) + 0.12 * nodding * torch.sin(1.5 * math.pi * time),
        "roll": uniform(0.08)
        + 0.16 * turn
        + 0.10 * nodding * torch.sin(math.pi * time)
        + 0.12 * strength * talk * ease * tilt,
        "zoom": uniform(0.06) + strength * ease * (0.22 * closer + 0.06 * talk),
        "yaw": uniform(0.10) + 0.30 * turn,
        "mouth": strength * talk * torch.sin(3 * math.pi * time).abs(),
        "brightness": uniform(0.04) + uniform(0.05) * ease,
        "contrast": uniform(0.1) + 0 * time,
    }


def _render(source: Tensor, target: Tensor | None, pose: dict[str, Tensor], size: int) -> Tensor:
    """Warp (B, 3, S, S) portraits, blended from `source` to `target`, by `pose`; return (B, T, 3, size, size)."""
    count, num_frames = pose["x"].shape
    fine = size * _SUPERSAMPLING
    axis = torch.linspace(-1, 1, fine) * (1 - 1 / fine)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    track = {name: value[:, :, None, None] for name, value in pose.items()}
    view = _VIEW * (1 - track["zoom"])
    cos, sin = torch.cos(track["roll"]), torch.sin(track["roll"])
    u = view * (cos * column - sin * row) - track["x"]
    v = view * (sin * column + cos * row) - track["y"]
    # Turning: foreshorten around the face's centre. Talking: stretch below the lips.
    face = torch.exp(-((u / 0.55) ** 2 + (v / 0.62) ** 2))
    u = u + track["yaw"] * 0.35 * face * (1 - (u / 0.6) ** 2).clamp(-1, 1)
    lips = torch.exp(-((u / 0.28) ** 2 + ((v - 0.26) / 0.16) ** 2))
    v = v - track["mouth"] * 0.07 * lips * torch.tanh((v - 0.24) / 0.04)
    grid = torch.stack([u, v], dim=-1).flatten(0, 1)
    portrait = source.repeat_interleave(num_frames, dim=0)
    if target is not None:
        reached = pose["drift"].flatten()[:, None, None, None]
        portrait = torch.lerp(portrait, target.repeat_interleave(num_frames, dim=0), reached)
    frames = F.grid_sample(portrait, grid, padding_mode="border", align_corners=False)
    frames = F.avg_pool2d(frames, _SUPERSAMPLING).unflatten(0, (count, num_frames))
    contrast, brightness = pose["contrast"][..., None, None, None], pose["brightness"][..., None, None, None]
    return ((frames - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)
