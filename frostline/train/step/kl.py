"""The KL divergence between the policy and the model without its LoRA, and its weight in the loss."""

from torch import Tensor

# Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593), section 2.2.
_GAIN, _LARGEST_ERROR = 0.1, 0.2


def velocity_kl(velocity: Tensor, reference: Tensor, sigma: float) -> Tensor:
    """Return the KL divergence of one denoising step, `mean((v - v_ref)^2) / (2 sigma^2)`.

    This is the KL divergence per dimension of two Gaussians with these velocities as means and standard deviation sigma
    (arXiv 2510.14255).

    Args:
        velocity: (B, C, F, h, w), of the policy, with graph.
        reference: same shape, without graph.
        sigma: noise level of the step, in (0, 1].
    Returns:
        0-dim, with graph.
    """
    return (velocity - reference).pow(2).mean() / (2 * sigma**2)


def adapted_weight(weight: float, kl_loss: float, target: float) -> float:
    """Return the weight of the KL term after a step with this KL loss: larger above the target, smaller below it.

    Args:
        weight: weight in the step, above 0.
        kl_loss: mean over the samples of the step, at least 0.
        target: target KL loss, above 0.
    Returns:
        `weight * (1 + 0.1 * clip(kl_loss / target - 1, -0.2, 0.2))`, a change of at most 2 % (arXiv 1909.08593).
    """
    error = min(max(kl_loss / target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
    return weight * (1 + _GAIN * error)
