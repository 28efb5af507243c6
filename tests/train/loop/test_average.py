"""The averaged adapter: its values, where it is used, and what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from steps import Clips

from frostline.models.lora import read_adapter
from frostline.train import WanTrainingModule
from frostline.train.loop.average import AdapterAverage
from frostline.train.loop.resume import find_resume
from frostline.train.loop.trainer import RunOptions, train
from frostline.train.settings import TrainerSettings

MakeModule = Callable[..., WanTrainingModule]
QUICK: dict[str, Any] = {
    "num_inference_steps": 2,
    "grad_start_step": 1,
    "grad_end_step": 1,
    "rewards": [{"type": "sharpness"}],
}


def test_it_is_the_weighted_sum_of_what_the_matrices_were() -> None:
    parameters = {"a": torch.nn.Parameter(torch.zeros(3))}
    average = AdapterAverage(0.25, parameters)
    expected = torch.zeros(3)
    # (1 + n) / (10 + n) is below 0.25 only for n = 1.
    for number, decay in ((1, 2 / 11), (2, 0.25), (3, 0.25)):
        with torch.no_grad():
            parameters["a"].fill_(number)
        average.follow(parameters)
        expected = decay * expected + (1 - decay) * number
    torch.testing.assert_close(average.tensors()["a"], expected)


def test_the_matrices_come_back_to_the_bit() -> None:
    parameters = {"a": torch.nn.Parameter(torch.rand(5))}
    average = AdapterAverage(0.9, {"a": torch.nn.Parameter(torch.ones(5))})
    before, memory = parameters["a"].detach().clone(), parameters["a"].data_ptr()
    with average.in_place_of(parameters):
        assert torch.equal(parameters["a"], torch.ones(5))
        assert parameters["a"].data_ptr() == memory
    assert torch.equal(parameters["a"], before)


def test_validation_sees_the_average_on_engines_and_it_is_saved(
    make_module: MakeModule, engines: Path, tmp_path: Path
) -> None:
    module = make_module(**QUICK, plan={"denoiser": "onnxruntime"}, engines=engines)
    generated = []
    clips = Clips(2, seed=11)
    data = {"prompt": clips.clips.prompts, "video": clips.clips.video}

    def look(step: int) -> dict[str, Any]:
        conditioning = module.forward_preprocess(data)
        made = module.generate(conditioning, torch.ones(2, *conditioning.latent_shape))
        adapter = {name: parameter.detach().clone() for name, parameter in module.trainable_parameters().items()}
        generated.append((step, adapter, made))
        return {}

    settings = TrainerSettings.parse(
        {"learning_rate": 1e-2, "max_train_steps": 3, "ema_decay": 0.5, "checkpointing_steps": 3}
    )
    train(module, clips, settings, tmp_path, RunOptions(validate=look, validation_steps=1))
    _, averaged, made = generated[-1]
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_ema.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in averaged.items())
    trained = read_adapter(tmp_path / "adapter").layers
    of_average = read_adapter(tmp_path / "adapter_ema").layers
    assert any(not torch.equal(trained[name].up, of_average[name].up) for name in trained)
    # The engine used the average in the validation, and the trained matrices afterwards, like PyTorch.
    look(4)
    assert module.runtime.plan["denoiser"].backend == "onnxruntime"
    _, matrices, made_afterwards = generated[-1]
    assert any(not torch.equal(matrices[name], tensor) for name, tensor in averaged.items())
    other = make_module(**QUICK, plan="torch")
    conditioning = other.forward_preprocess(data)
    expected = {}
    for name, served in (("adapter_ema", made), ("adapter", made_afterwards)):
        other.load_adapter(tmp_path / name)
        expected[name] = other.generate(conditioning, torch.ones(2, *conditioning.latent_shape))
        torch.testing.assert_close(served, expected[name], atol=1e-4, rtol=0)
    assert (expected["adapter"] - expected["adapter_ema"]).abs().max() > 1e-3


def test_an_average_that_begins_at_a_resume_goes_on_to_the_bit(make_module: MakeModule, tmp_path: Path) -> None:
    """Compute the decay from the number of updates of the average, not from the steps of the run."""

    def run(out: Path, steps: int, **changes: Any) -> None:
        values = {"learning_rate": 1e-2, "max_train_steps": steps, "checkpointing_steps": 1, **changes}
        options = RunOptions(resume=find_resume(out, "latest"))
        train(make_module(**QUICK), Clips(2, seed=11), TrainerSettings.parse(values), out, options)

    for name, parts in (("once", [4]), ("twice", [3, 4])):
        run(tmp_path / name, 2)
        for steps in parts:
            run(tmp_path / name, steps, ema_decay=0.9)
    once, twice = (
        (tmp_path / name / "checkpoint-4" / "adapter_ema.safetensors").read_bytes() for name in ("once", "twice")
    )
    assert once == twice
