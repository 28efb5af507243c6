"""AOTInductor: packages without weights, which use the trainer's weights at any address."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_model import (
    SHAPES,
    assert_follows_the_trainer,
    assert_outputs_are_the_callers,
    assert_parity,
    assert_replaced_tensors_are_followed,
    assert_threads_are_served,
    network_of,
    sample_at,
)
from torch import Tensor, nn

from frostline.errors import EngineError
from frostline.export.tracing.torch_export import trace_program
from frostline.runtime.backends import get_backend
from frostline.runtime.backends.aotinductor import AOTInductorRunner
from frostline.runtime.backends.base.options import BuildOptions
from frostline.runtime.dynamic_dim import Dimension
from frostline.runtime.stage import Network, TensorSpec

BACKEND = get_backend("aotinductor")
pytestmark = pytest.mark.skipif(BACKEND.unavailable() is not None, reason="no C++ compiler")


def compile_package(network: Network, folder: Path) -> bytes:
    return (folder / BACKEND.build(network, trace_program(network), folder, BuildOptions())).read_bytes()


@pytest.fixture(scope="module")
def denoiser() -> Network:
    return network_of("denoiser", "denoiser")


@pytest.fixture(scope="module")
def package(denoiser: Network, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compile_package(denoiser, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def runner(package: bytes, denoiser: Network) -> AOTInductorRunner:
    return AOTInductorRunner(package, denoiser)


def test_parity_at_the_sizes_of_the_profile_and_at_another(denoiser: Network, runner: AOTInductorRunner) -> None:
    other = sample_at(denoiser, batch=1, latent_frames=3, height=3, width=5)
    for inputs in (denoiser.samples("opt"), denoiser.samples("min"), other):
        assert_parity(denoiser, runner, inputs)


def test_outputs_are_the_callers(denoiser: Network, runner: AOTInductorRunner) -> None:
    assert_outputs_are_the_callers(denoiser, runner)


def test_threads_are_served_at_shapes_of_their_own(denoiser: Network, runner: AOTInductorRunner) -> None:
    assert_threads_are_served(denoiser, runner)


def test_live_tensors_that_were_replaced_are_followed(denoiser: Network, runner: AOTInductorRunner) -> None:
    assert_replaced_tensors_are_followed(denoiser, runner)


@pytest.mark.parametrize("rank", [8, 4, 16])
def test_follows_the_trainer_at_any_rank(rank: int, package: bytes) -> None:
    network = network_of("denoiser", "denoiser", rank=rank)
    assert_follows_the_trainer(network, AOTInductorRunner(package, network))


def test_weights_are_the_modules_own_and_updates_in_place_are_followed(
    package: bytes, denoiser: Network, runner: AOTInductorRunner
) -> None:
    own = {tensor.data_ptr() for tensor in (*denoiser.module.parameters(), *denoiser.module.buffers())}
    assert runner._constants
    assert {tensor.data_ptr() for tensor in runner._constants.values()} <= own
    live = {tensor.data_ptr() for tensor in denoiser.live.values()}
    assert not live & {tensor.data_ptr() for tensor in runner._constants.values()}
    assert len(package) < 8e6
    inputs = denoiser.samples("opt")
    before = runner(**inputs)["velocity"]
    weights = [parameter for parameter in denoiser.module.parameters() if not parameter.requires_grad]
    saved = [weight.clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.1)
        assert_parity(denoiser, runner, inputs)
        assert (runner(**inputs)["velocity"] - before).norm() > 0.01 * before.norm()
    finally:
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)


def test_pooling_of_odd_and_smallest_images(tmp_path: Path) -> None:
    """Do not specialise on the example of even size: P-Net halves its images."""
    network = network_of("face_detector", "pnet")
    pnet = AOTInductorRunner(compile_package(network, tmp_path), network)
    for height, width in ((12, 12), (12, 13), (13, 12), (41, 64), (64, 41), (40, 40)):
        for faces in (1, 3):
            inputs = sample_at(network, faces=faces, face_height=height, face_width=width)
            assert_parity(network, pnet, inputs, "face_detector")


class Convolutions(nn.Module):
    """Two convolutions in time and space. PyTorch uses another kernel for batch size 1 than for 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 4, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        return self.second(torch.nn.functional.silu(self.first(video)))


def test_convolutions_at_batch_one(tmp_path: Path) -> None:
    batch, height = Dimension("batch", *SHAPES.batch), Dimension("height", 2, 8, 16, multiple=2)
    module = Convolutions().eval().requires_grad_(False)
    network = Network("convolutions", module, (TensorSpec("video", (batch, 3, 4, height, 8)),), ("y",))
    own = AOTInductorRunner(compile_package(network, tmp_path), network)
    for size in ("opt", "min"):
        assert_parity(network, own, network.samples(size), "vae_encoder")


def test_a_tensor_that_is_no_weight_is_named(denoiser: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a tensor that is a plain attribute of a module, to which the compiler gives a generated name."""
    package = SimpleNamespace(get_constant_fqns=lambda: ["_tensor_constant0"])
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda content: package)
    with pytest.raises(EngineError, match="_tensor_constant0, which is neither a parameter nor a buffer"):
        AOTInductorRunner(b"", denoiser)


def test_a_package_of_another_network_is_refused(package: bytes) -> None:
    with pytest.raises(EngineError, match="cannot load text_encoder"):
        AOTInductorRunner(package, network_of("text_encoder", "text_encoder"))


def test_says_that_a_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs the C++ compiler no-such-compiler" in (BACKEND.unavailable() or "")
