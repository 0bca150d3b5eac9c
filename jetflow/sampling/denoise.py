"""Denoising of samples by the score of the flow: one step, or along falling noise levels."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jetflow import likelihood
from jetflow.types import Condition, Flow, UsageError, is_arrays


class Denoising(NamedTuple):
    """From the noise of the first level to none (iTARFlow, arXiv 2604.20041).

    At each level t the mean of the clean image is estimated, x0, and x moves to the next level s:
    x ← x0 + s·ε, where ε is (x − x0)/t, or drawn anew. After the last level s is 0.

    Attributes:
        levels: falling, in units where pixels span [-1, 1]; a flow that is noise-conditional is
            told each of them, any other has one.
        clip: whether each x0 is clipped to the range of pixels.
        eta: η; ε is √(1 − η²)·(x − x0)/t + η·N(0, 1).
    """

    levels: tuple[float, ...]
    clip: bool = False
    eta: float = 0.0


def check_denoising(flow: Flow, denoise: Denoising | None) -> None:
    """Raise a UsageError on levels that cannot be, or that this flow is not told."""
    if denoise is None:
        return
    levels = denoise.levels
    if len(levels) != 1 and not flow.noise_conditional:
        raise UsageError(
            f"denoise_steps is {len(levels)}, but this flow knows one level of noise; it needs one "
            "that is noise-conditional: set it to 1"
        )
    for level in [level for level in levels if not 0 < level < math.inf]:
        raise UsageError(f"denoise is {level}; expected more than 0")
    if list(levels) != sorted(levels, reverse=True):
        raise UsageError(f"denoise goes along {levels}; expected falling levels, below noise_level")
    if denoise.clip and is_arrays(flow.image_shape):
        raise UsageError("denoise_clip is for pixels, and this flow is of arrays; leave it out")
    if not 0 <= denoise.eta <= 1:
        raise UsageError(f"denoise_eta is {denoise.eta}; expected 0 to 1")


def denoised(
    flow: Flow,
    variables: Any,
    x: Float[Array, "B *X"],
    condition: Condition,
    std: float | Float[Array, ""],
) -> Float[Array, "B *X"]:
    """x + σ²·∇ₓ log p(x): the mean of the clean image given a noisy one (Tweedie's formula).

    p is the density that training maximises: its prior is standard normal, also where sampling
    uses a learned variance.

    Args:
        x: pixel values.
        std: σ, in the [-1, 1] units of `Noise.std`.
    """

    def log_prob(x):
        z, logdet = flow.apply(variables, x, *condition, method="forward")
        return -likelihood.nll(z, logdet).sum()

    return x + (std * flow.pixel_scale) ** 2 * jax.grad(log_prob)(x)


def denoised_along(
    flow: Flow,
    variables: Any,
    x: Float[Array, "B *X"],
    label: Any,
    levels: Float[Array, "N"],
    keys: UInt32[Array, "B K"] | None,
    *,
    clip: bool,
    eta: float | Float[Array, ""],
) -> Float[Array, "B *X"]:
    """The images after all levels of a `Denoising`; x are pixel values with noise of the first.

    Args:
        keys: of each image, as data, for the noise that is drawn anew; None where none is.
    """

    def clean(x, level):
        level_of_all = jnp.full(len(x), level) if flow.noise_conditional else None
        x0 = denoised(flow, variables, x, Condition(label, level_of_all), level)
        return jnp.clip(x0, 0, 2 * flow.pixel_scale) if clip else x0

    def step(x, inputs):
        number, level, following = inputs
        x0 = clean(x, level)
        noise = (x - x0) / level
        if keys is not None:
            of_step = jax.vmap(lambda key: jax.random.fold_in(key, number))(wrapped)
            new = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(of_step)
            noise = jnp.sqrt(1 - eta**2) * noise + eta * flow.pixel_scale * new
        return x0 + following * noise, None

    levels = levels.astype(x.dtype)
    if len(levels) == 1:
        return clean(x, levels[0])
    wrapped = None if keys is None else jax.random.wrap_key_data(keys)
    inputs = jnp.arange(len(levels)), levels, jnp.append(levels[1:], 0)
    return jax.lax.scan(step, x, inputs)[0]
