"""Every face detector and embedder on the engines that run here: parity, and a frame alone as in a batch."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scrfd_file import scrfd_file
from torch import Tensor, nn

from frostline.export.exporter import export_stage
from frostline.export.tracing.trace_cache import Traces
from frostline.models.faces import FaceEmbedder, FacenetEmbedder, load_detector, load_embedder, quantize_frames
from frostline.models.tiny.clips import held_out_clips
from frostline.rewards.face_identity.detector import _side
from frostline.rewards.face_identity.stages import FaceModels, build_face_stages
from frostline.runtime.engines.store import EngineStore
from frostline.runtime.identity.fingerprint import stage_key, weights_sha256
from frostline.runtime.runtime import Runtime
from frostline.runtime.stage import Stage
from frostline.stages.shapes import ShapeRange

BACKENDS = ("onnxruntime", "openvino")
DETECTORS = ("mtcnn", "yunet", "scrfd")
EMBEDDERS = ("sface", "facenet", "arcface", "arcface-bgr", "dlib")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights of networks that are not installed: an SCRFD file, an ArcFace file, InceptionResnetV1."""
    from facenet_pytorch import InceptionResnetV1

    folder = tmp_path_factory.mktemp("weights")
    scrfd_file(folder / "scrfd.onnx")
    torch.manual_seed(0)
    torch.save(InceptionResnetV1(pretrained=None, classify=False).state_dict(), folder / "facenet.pt")
    _arcface_file(folder / "arcface.onnx")
    return folder


def _arcface_file(path: Path) -> None:
    """Write the blocks of an iresnet as in glintr100: BatchNorm, Conv, PReLU, addition, Flatten, Gemm, BatchNorm."""

    class Block(nn.Module):
        def __init__(self, channels_in: int, channels: int) -> None:
            super().__init__()
            self.norm, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels)
            self.conv, self.conv2 = (
                nn.Conv2d(c, channels, 3, s, 1, bias=False) for c, s in ((channels_in, 1), (channels, 2))
            )
            self.act, self.down = nn.PReLU(channels), nn.Conv2d(channels_in, channels, 1, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(self.conv2(self.act(self.conv(self.norm(x))))) + self.down(x)

    blocks = [Block(8, 8), Block(8, 16), Block(16, 16), Block(16, 16)]
    head = [nn.BatchNorm2d(16), nn.Dropout(), nn.Flatten(), nn.Linear(16 * 49, 64), nn.BatchNorm1d(64)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.PReLU(8), *blocks, *head).eval()
    torch.onnx.export(
        model, (torch.zeros(1, 3, 112, 112),), path, dynamo=False, opset_version=11, input_names=["input.1"]
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path) -> EngineStore:
    return EngineStore(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def traces() -> Mapping[str, Traces]:
    """Return traces by detector or embedder, from which the engines of all backends are built."""
    return defaultdict(Traces)


def _detector_stage(name: str, files: Path) -> Stage:
    detector = load_detector(f"scrfd:{files / 'scrfd.onnx'}" if name == "scrfd" else name)
    embedder = load_embedder("sface")
    assert isinstance(embedder, nn.Module)
    return build_face_stages(FaceModels(detector, embedder), ShapeRange())[0]


def _embedder_stage(name: str, files: Path) -> tuple[Stage, FaceEmbedder]:
    made: dict[str, Callable[[], FaceEmbedder]] = {
        **{name: partial(load_embedder, name) for name in ("sface", "dlib")},
        "facenet": partial(FacenetEmbedder, files / "facenet.pt"),
        "arcface": partial(load_embedder, f"arcface:{files / 'arcface.onnx'}"),
        "arcface-bgr": partial(load_embedder, f"arcface:{files / 'arcface.onnx'}", "bgr"),
    }
    embedder = made[name]()
    assert isinstance(embedder, nn.Module)
    _, stage = build_face_stages(FaceModels(load_detector("yunet"), embedder), ShapeRange())
    return stage, embedder


def test_files_of_one_name_and_equal_weights_are_two_engines(files: Path, tmp_path: Path) -> None:
    """Change only an attribute, which is not a tensor: engines and cached embeddings must not be shared."""
    model = onnx.load(files / "arcface.onnx")
    norm = next(node for node in model.graph.node if node.op_type == "PRelu")
    norm.CopyFrom(onnx.helper.make_node("LeakyRelu", norm.input[:1], norm.output, alpha=0.01))
    prints, keys = set(), set()
    for alpha in (0.01, 0.25):
        norm.attribute[0].f = alpha
        path = tmp_path / str(alpha) / "arcface.onnx"
        path.parent.mkdir()
        onnx.save(model, path)
        stage, _ = _embedder_stage("arcface", path.parent)
        weights = weights_sha256(stage)
        keys.add(stage_key(stage, "onnxruntime", "fp32", "0" * 64))
        prints.add(weights)
    assert len(prints) == len(keys) == 2


def test_two_orders_of_channels_are_two_engines(files: Path) -> None:
    stages = [_embedder_stage(name, files)[0] for name in ("arcface", "arcface-bgr")]
    assert len({weights_sha256(stage) for stage in stages}) == 2
    assert len({stage_key(stage, "onnxruntime", "fp32", "0" * 64) for stage in stages}) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str, backend: str, files: Path, store: EngineStore, traces: Mapping[str, Traces]) -> None:
    stage = _detector_stage(name, files)
    exported = export_stage(stage, backend, store, traces=traces[name])
    assert exported.manifest.verified
    detect = Runtime({stage.name: stage}, backend, store.root, strict=True)["face_detector"]
    # A size and a number of frames that differ from those of the trace.
    frames = quantize_frames(held_out_clips(1, seed=5).video[0])
    frames = nn.functional.interpolate(frames.float(), (100, 140), mode="bicubic").clamp(0, 255).byte()[:5]
    expected, together = stage.torch({"frames": frames}), detect(frames=frames)
    assert len(expected["boxes"]) >= 5
    for t in range(len(frames)):
        alone = detect(frames=frames[t : t + 1])
        for other in (together, expected):
            own = other["frame_index"] == t
            assert len(alone["boxes"]) == own.sum()
            torch.testing.assert_close(
                alone["probabilities"].sort()[0], other["probabilities"][own].sort()[0], atol=1e-5, rtol=0
            )
            if name != "scrfd":  # its random faces have nearly equal areas, which determine the order
                for key in ("boxes", "landmarks"):
                    torch.testing.assert_close(alone[key], other[key][own], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedders(name: str, backend: str, files: Path, store: EngineStore, traces: Mapping[str, Traces]) -> None:
    stage, embedder = _embedder_stage(name, files)
    exported = export_stage(stage, backend, store, traces=traces[name])
    assert exported.manifest.verified
    embed = Runtime({stage.name: stage}, backend, store.root, strict=True)["face_embedder"]
    faces = torch.rand(5, 3, embedder.image_size, embedder.image_size) * 2 - 1
    together, expected = embed(faces=faces)["embeddings"], stage.torch({"faces": faces})["embeddings"]
    alone = torch.cat([embed(faces=face[None])["embeddings"] for face in faces])
    assert together.shape == (5, embedder.embedding_dim)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["yunet", "scrfd", "arcface"])
def test_what_is_new_builds_for_tensorrt(
    name: str, files: Path, store: EngineStore, traces: Mapping[str, Traces]
) -> None:
    """Build without a GPU; MTCNN and SFace are built in the tests of the backend."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    stage = _embedder_stage(name, files)[0] if name in EMBEDDERS else _detector_stage(name, files)
    exported = export_stage(stage, "tensorrt-rtx", store, traces=traces[name])
    assert exported.built
    assert all(artifact.bytes > 0 for artifact in exported.manifest.artifacts.values())


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 200), st.sampled_from([1, 32]))
def test_the_typical_side_is_within_the_range(low: int, typical: int, high: int, multiple: int) -> None:
    """Choose an odd one if the detector supports any size and the range contains one."""
    shapes = replace(ShapeRange(), face_height=(low, low + typical, low + typical + high))
    side = _side(shapes, "face_height", multiple)
    assert side.min <= side.opt <= side.max
    if multiple == 1:
        assert abs(side.opt - (low + typical)) <= 1
        assert side.opt % 2 or side.min == side.max
