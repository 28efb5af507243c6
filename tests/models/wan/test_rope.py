"""RoPE and the timestep sinusoid in real fp32 compared with diffsynth's complex128 and float64."""

import pytest
import torch
from diffsynth.models.wan_video_dit import precompute_freqs_cis_3d, rope_apply, sinusoidal_embedding_1d
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frostline.models.wan.rope import apply_rope, grid_table, rope_table, sinusoid_frequencies, timestep_sinusoid


@pytest.mark.parametrize("head_dim", [32, 128], ids="head_dim{}".format)
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 6, 6), (5, 4, 7), (21, 2, 3)], ids=str)
def test_equals_rope_apply_of_diffsynth(grid: tuple[int, int, int], head_dim: int) -> None:
    f, h, w = grid
    axes = precompute_freqs_cis_3d(head_dim)
    # In the layout of `model_fn_wan_video`.
    freqs = torch.cat(
        [
            axes[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
            axes[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
            axes[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ],
        dim=-1,
    ).reshape(f * h * w, 1, -1)
    heads = 2
    x = torch.randn(2, f * h * w, heads * head_dim, generator=torch.Generator().manual_seed(0))
    tables = [rope_table(axis) for axis in axes]
    cos = grid_table((tables[0][0], tables[1][0], tables[2][0]), grid)
    sin = grid_table((tables[0][1], tables[1][1], tables[2][1]), grid)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(apply_rope(x, cos, sin, heads), rope_apply(x, freqs, heads), atol=1e-6, rtol=0)


def test_keeps_the_type_and_the_length_of_every_pair() -> None:
    tables = [rope_table(axis) for axis in precompute_freqs_cis_3d(32)]
    cos, sin = (grid_table((tables[0][i], tables[1][i], tables[2][i]), (2, 3, 4)) for i in range(2))
    x = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    assert apply_rope(x.bfloat16(), cos, sin, 2).dtype == torch.bfloat16
    rotated = apply_rope(x, cos, sin, 2)
    assert not torch.allclose(rotated, x, atol=0.1)
    lengths, before = (tensor.unflatten(-1, (-1, 2)).norm(dim=-1) for tensor in (rotated, x))
    torch.testing.assert_close(lengths, before, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotated[:, 0], x[:, 0], atol=0, rtol=0)  # position (0, 0, 0) rotates nothing


@pytest.mark.parametrize("freq_dim", [64, 256])
def test_timestep_sinusoid_is_float64_to_1e_6(freq_dim: int) -> None:
    coarse, fine = sinusoid_frequencies(freq_dim)

    @given(st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=16))
    @example([0.0, 0.5, 999.5, 1000.0, 972.2222])
    @settings(max_examples=300, deadline=None)
    def check(timesteps: list[float]) -> None:
        t = torch.tensor(timesteps)
        ours = timestep_sinusoid(t, coarse, fine)
        theirs = sinusoidal_embedding_1d(freq_dim, t.double())
        assert ours.dtype == torch.float32
        assert theirs.dtype == torch.float64
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)

    check()


def test_timestep_sinusoid_of_every_token() -> None:
    coarse, fine = sinusoid_frequencies(64)
    t = torch.tensor([[0.0, 500.0, 999.9], [1.0, 2.0, 3.0]])
    per_token = timestep_sinusoid(t, coarse, fine)
    assert per_token.shape == (2, 3, 64)
    torch.testing.assert_close(per_token[0, 2], timestep_sinusoid(t[0, 2:], coarse, fine)[0], atol=0, rtol=0)


def test_a_plain_product_in_fp32_would_not_do() -> None:
    """Show why each frequency is split into two parts."""
    exact = sinusoidal_embedding_1d(256, torch.linspace(0, 1000, 500, dtype=torch.float64).float().double())
    coarse, fine = sinusoid_frequencies(256)
    angle = torch.linspace(0, 1000, 500, dtype=torch.float64).float()[:, None] * (coarse + fine)
    plain = torch.cat([angle.cos(), angle.sin()], dim=-1)
    assert (plain - exact).abs().max() > 1e-5
