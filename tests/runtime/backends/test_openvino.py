"""OpenVINO: fp32 precision, memory that is shared with torch, outputs that belong to the caller."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from small_model import (
    assert_follows_the_trainer,
    assert_outputs_are_the_callers,
    assert_parity,
    assert_replaced_tensors_are_followed,
    assert_threads_are_served,
    network_of,
    sample_at,
)

from frostline.errors import EngineError, ShapeError
from frostline.runtime.backends import get_backend
from frostline.runtime.stage import Network

Source = Callable[..., Path]
pytest.importorskip("openvino")

from frostline.runtime.backends import openvino as openvino_backend  # noqa: E402
from frostline.runtime.backends.openvino import OpenVinoRunner  # noqa: E402

NETWORKS = [
    ("text_encoder", "text_encoder"),
    ("vae_encoder", "first"),
    ("denoiser", "denoiser"),
    ("face_detector", "pnet"),
    ("face_detector", "onet"),
]
EXTENTS = {"batch": 3, "latent_frames": 3, "height": 3, "width": 5, "faces": 7, "face_height": 17, "face_width": 30}


@pytest.fixture(scope="module")
def denoiser() -> Network:
    return network_of("denoiser", "denoiser")


@pytest.fixture(scope="module")
def runner(denoiser: Network, onnx_source: Source) -> OpenVinoRunner:
    return OpenVinoRunner(onnx_source("denoiser", "denoiser"), denoiser)


@pytest.mark.parametrize(("stage", "name"), NETWORKS)
def test_parity_at_the_sizes_of_the_profile_and_at_another(stage: str, name: str, onnx_source: Source) -> None:
    network = network_of(stage, name)
    own = OpenVinoRunner(onnx_source(stage, name), network)
    for inputs in (network.samples("opt"), network.samples("min"), sample_at(network, **EXTENTS)):
        assert_parity(network, own, inputs, stage)
    assert_outputs_are_the_callers(network, own)


def test_inputs_in_any_memory_layout_are_computed(onnx_source: Source) -> None:
    """Keep the contiguous copy of a strided input alive until the call ends."""
    network = network_of("face_detector", "onet")
    own = OpenVinoRunner(onnx_source("face_detector", "onet"), network)
    for seed in range(3):
        images = sample_at(network, seed, faces=32)["images"]
        strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert not strided.is_contiguous()
        assert_parity(network, own, {"images": strided}, "face_detector")


def test_follows_the_trainer(denoiser: Network, runner: OpenVinoRunner) -> None:
    assert_follows_the_trainer(denoiser, runner)


def test_one_engine_serves_another_rank(onnx_source: Source) -> None:
    network = network_of("denoiser", "denoiser", rank=4)
    assert_follows_the_trainer(network, OpenVinoRunner(onnx_source("denoiser", "denoiser"), network))


def test_threads_are_served_at_shapes_of_their_own(denoiser: Network, runner: OpenVinoRunner) -> None:
    assert_threads_are_served(denoiser, runner)


def test_live_tensors_that_were_replaced_are_followed(onnx_source: Source) -> None:
    """Also test tensors that are not contiguous, and tensors of another rank."""
    network = network_of("denoiser", "denoiser")
    own = OpenVinoRunner(onnx_source("denoiser", "denoiser"), network)
    assert_replaced_tensors_are_followed(network, own)


def test_the_kernels_of_shapes_seen_before_are_bounded(onnx_source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that memory grows less if fewer kernels are cached, at shapes that keep changing."""
    network, growth = network_of("face_detector", "pnet"), {}
    for kernels in (8, 5000):
        monkeypatch.setattr(openvino_backend, "_CACHED_KERNELS", kernels)
        own, before = OpenVinoRunner(onnx_source("face_detector", "pnet"), network), 0
        for index in range(-50, 400):
            if index == 0:
                before = psutil.Process().memory_info().rss
            own(images=torch.rand(1, 3, 12 + index % 40, 28 + index // 4))
        growth[kernels] = psutil.Process().memory_info().rss - before
    assert growth[8] < growth[5000] / 2


def test_live_tensors_are_shared(denoiser: Network, runner: OpenVinoRunner) -> None:
    runner(**denoiser.samples("min"))
    for name, tensor in denoiser.live.items():
        assert runner._request.get_tensor(name).data.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precisions_go_in_and_out(dtype: torch.dtype, onnx_source: Source) -> None:
    network = network_of("denoiser", "denoiser", dtype)
    own = OpenVinoRunner(onnx_source("denoiser", "denoiser", dtype), network)
    assert_parity(network, own, network.samples("opt"))
    assert_outputs_are_the_callers(network, own)


def test_wrong_inputs_are_refused(denoiser: Network, runner: OpenVinoRunner) -> None:
    inputs = denoiser.samples("opt")
    with pytest.raises(EngineError, match=r"input latents is torch\.float16, the engine requires torch\.float32"):
        runner(**{**inputs, "latents": inputs["latents"].half()})
    with pytest.raises(ShapeError, match="its batch differs from that of latents"):
        runner(**{**inputs, "timestep": inputs["timestep"][:1]})
    with pytest.raises(ShapeError, match="input latents has shape"):
        runner(**{**inputs, "latents": inputs["latents"][..., :7]})
    with pytest.raises(EngineError, match="lacks its input context"):
        runner(**{name: value for name, value in inputs.items() if name != "context"})
    with pytest.raises(EngineError, match="has no input image"):
        runner(**inputs, image=inputs["latents"])


def test_a_file_that_is_no_model_is_an_engine_error(denoiser: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(EngineError, match="OpenVINO cannot load"):
        OpenVinoRunner(path, denoiser)


def test_serves_cpus_only() -> None:
    backend = get_backend("openvino")
    assert backend.obstacle(torch.device("cpu"), "cpu") is None
    assert "OpenVINO is only used on CPUs" in (backend.obstacle(torch.device("cuda"), "sm_89") or "")
