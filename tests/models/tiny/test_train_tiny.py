"""Training of the tiny models from the command line: parts that `--keep` names are not changed."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frostline.models.tiny import train
from frostline.models.tiny.architecture import DENOISER
from frostline.models.tiny.train_denoiser import Pool

WEIGHTS = Path(train.__file__).parent / "weights"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_that_are_kept_are_read_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "weights", tmp_path / "work"
    shutil.copytree(WEIGHTS, out)
    before = contents(out)
    keep = ("--keep", "vae", "text", "high_noise", "ti2v")
    options = ("--clips", "4", "--denoiser-steps", "2", "--drift-steps", "1", "--work", str(work), "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["train", *keep, *options])
    train.main()
    after = contents(out)
    assert [name for name in before if before[name] != after.get(name)] == ["tiny/diffusion_pytorch_model.safetensors"]
    assert before.keys() == after.keys()
    trained = load_file(out / "tiny" / "diffusion_pytorch_model.safetensors")
    assert trained["patch_embedding.weight"].shape == (DENOISER["dim"], DENOISER["in_dim"], 1, 2, 2)

    # The clips are encoded once and stored in `pool_4.safetensors`.
    pool = Pool(**load_file(work / "pool_4.safetensors"))
    assert pool.latents.shape == pool.image.shape == (4, 16, 3, 12, 12)
    assert pool.latents.std() == pytest.approx(1, abs=0.3), "the latents of the installed VAE must be normalised"
    assert torch.equal(pool.y(torch.tensor([1]))[0, :4, 0], torch.ones(4, 12, 12))
    most = pool.drifting(0.8)
    assert 0 < len(most.drift) < 4 and most.drift.min() >= 0.8 > pool.drift.min()
    assert len(most.latents) == len(most.image) == len(most.prompt) == len(most.drift)
    (work / "denoiser.pt").unlink()
    (work / "drift.pt").unlink()
    monkeypatch.setattr(train.VideoVAE_, "encode", None)
    train.main()
