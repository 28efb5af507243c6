"""The KL divergence between the policy and the model without its LoRA."""

from torch import Tensor


def velocity_kl(velocity: Tensor, reference: Tensor, sigma: float) -> Tensor:
    """Return the KL divergence of one denoise step, `mean((v - v_ref)^2) / (2 sigma^2)`.

    Of two Gaussians with these velocities as means and the standard deviation sigma, per dimension (arXiv 2510.14255).

    Args:
        velocity: (B, C, F, h, w), of the policy, with graph.
        reference: of the same shape, without graph.
        sigma: noise level of the step, in (0, 1].
    Returns:
        0-dim, with graph.
    """
    return (velocity - reference).pow(2).mean() / (2 * sigma**2)
