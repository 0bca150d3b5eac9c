"""The score-based denoising step that follows sampling (TarFlow, arXiv 2412.06329)."""

import jax
from jaxtyping import Array, Float, Int

from jetflow import likelihood
from jetflow.types import Flow


def denoised(
    flow: Flow, variables, x: Float[Array, "B H W C"], label: Int[Array, "B"] | None, std
) -> Float[Array, "B H W C"]:
    """x + σ²·∇ₓ log p(x): the mean of the clean image given a noisy one (Tweedie's formula).

    p is the density that training maximises: its prior is standard normal, also where sampling
    uses a learned variance.

    Args:
        x: pixel values.
        std: σ, in the [-1, 1] units of `Noise.std`.
    """

    def log_prob(x):
        z, logdet = flow.apply(variables, x, label, method="forward")
        return -likelihood.nll(z, logdet).sum()

    return x + (std * flow.pixel_scale) ** 2 * jax.grad(log_prob)(x)
