"""The KL references of a tail, computed in one call, equal those of separate calls."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.models.tiny.clips import held_out_clips
from frostline.stages.denoiser import REFERENCE
from frostline.train import WanTrainingModule
from frostline.train.step import rollout as sampling

MakeModule = Callable[..., WanTrainingModule]
ORT = "onnxruntime"


def kl_and_calls(module: WanTrainingModule, data: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
    """Return the KL of each tail step with its gradient (flat), and the batch size of each call of the KL reference."""
    batches = []
    run = module.runtime.run

    def counting(stage: str, inputs: Mapping[str, Tensor], **how: Any) -> dict[str, Tensor]:
        if how.get("variant") == REFERENCE:
            batches.append(len(inputs["latents"]))
        return run(stage, inputs, **how)

    module.runtime.run = counting  # type: ignore[method-assign]
    conditioning = module.forward_preprocess(data)
    noise = module.noise(conditioning)
    sampler, steps = module.parts.sampler, module.parts.steps
    latents, first = sampler.start(conditioning, noise, steps.end + 1, None)
    latents = sampler.head(latents, conditioning.conditions, first, max(steps.start, steps.high_noise))
    sampled = sampler.tail(latents, conditioning, steps.draw())
    kl = torch.stack([*sampled.kl.values()])
    gradients = torch.autograd.grad(kl.sum(), [*module.trainable_parameters().values()])
    del module.runtime.run
    return torch.cat([kl.detach(), *(gradient.flatten() for gradient in gradients)]), batches


@pytest.fixture
def data() -> dict[str, Any]:
    clips = held_out_clips(2, seed=3, num_frames=5, size=64)
    return {"prompt": clips.prompts, "video": clips.video}


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "tiny-ti2v"])
@pytest.mark.parametrize("backend", ["torch", ORT])
def test_all_kl_references_in_one_call(
    backend: str,
    model: str,
    data: dict[str, Any],
    make_module: MakeModule,
    variant_engines: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With two experts, the tail starts with the high-noise expert.
    settings = {"grad_start_step": 2 if model == "tiny-moe" else 4}
    module = make_module(model, plan={"denoiser": backend}, engines=variant_engines, **settings)
    together, batches = kl_and_calls(module, data)
    assert len(batches) == 1
    monkeypatch.setattr(sampling, "_POSITIONS_AT_ONCE", 0)
    alone, separate = kl_and_calls(module, data)
    assert separate == [2] * (batches[0] // 2)
    assert len(separate) >= 4
    kl = len(separate)
    torch.testing.assert_close(together[:kl], alone[:kl], atol=1e-6, rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(together[kl:], alone[kl:], dim=0) >= 0.99999
    assert (together[kl:].norm() / alone[kl:].norm() - 1).abs() <= 1e-4


def test_more_than_the_engine_serves_goes_one_by_one(
    data: dict[str, Any], make_module: MakeModule, engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines support up to 32 samples: 4 steps of 10 samples are too many for one call, but 10 are not."""
    many = {"prompt": data["prompt"] * 5, "video": data["video"].repeat(5, 1, 1, 1, 1)}
    module = make_module(plan={"denoiser": ORT}, engines=engines)
    assert kl_and_calls(module, many)[1] == [10, 10, 10, 10]
    assert "torch for this shape" not in caplog.text


class ValuesAskedFor(TorchDispatchMode):
    """Count the reads of tensor values on the host; on a GPU, the host waits at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The schedule is in float64, and always on the CPU.
        self.count += func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.float64
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", ORT])
def test_from_noise_to_latents_no_value_is_asked_for(
    backend: str, data: dict[str, Any], make_module: MakeModule, engines: Path
) -> None:
    module = make_module(plan={"denoiser": backend}, engines=engines)
    steps = module.parts.steps
    conditioning = module.forward_preprocess(data)
    noise = module.noise(conditioning)
    with ValuesAskedFor() as asked:
        latents = module.parts.sampler.head(noise, conditioning.conditions, 0, steps.start)
        module.parts.sampler.tail(latents, conditioning, steps.draw())
    assert asked.count == 0
