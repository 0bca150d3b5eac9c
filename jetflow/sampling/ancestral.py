"""Sampling: prior noise through the inverse, with guidance and a denoising step."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from jetflow import likelihood
from jetflow.flows.labels import check_labels
from jetflow.noise import keys_by_example
from jetflow.types import AnyArray, Flow, Guidance, UsageError


def sample(
    flow: Flow,
    variables,
    key: Key[Array, ""],
    *,
    num: int,
    label: int | Int[AnyArray, "N"] | None = None,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    denoise: float = 0.0,
    noise: str = "uniform",
    method: str = "cached",
    batch_size: int = 64,
) -> UInt8[np.ndarray, "N H W C"]:
    """`num` images.

    Args:
        key: image i depends on the key and on i alone, not on `num` or `batch_size`.
        label: one class for all images, or one an image; None or -1 for no label.
        guidance: see `Guidance`; for flows with labels, or with a temperature other than 1.
        temperature: multiplies the standard deviation of the prior.
        denoise: σ of one score step after sampling, see `denoised`; 0 for none.
        noise: the kind of noise that the flow was trained with: values of a dequantised pixel
            lie above it, those of a noisy one around it.
        method: how a TarFlow is inverted: "cached", token by token with a KV cache.

    Raises:
        UsageError: on a label out of range, or guidance that cannot guide.
    """
    if method != "cached":
        raise UsageError(f"method is {method!r}; expected 'cached'")
    pixels = sample_pixels(
        flow, variables, key, num=num, label=label, guidance=guidance,
        temperature=temperature, denoise=denoise, batch_size=batch_size,
    )  # fmt: skip
    return quantise(pixels, noise)


def sample_pixels(
    flow: Flow,
    variables,
    key: Key[Array, ""],
    *,
    num: int,
    label: int | Int[AnyArray, "N"] | None = None,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    denoise: float = 0.0,
    batch_size: int = 64,
) -> Float[np.ndarray, "N H W C"]:
    """`sample` before rounding: pixel values as the flow gives them, unclipped."""
    labels = check_labels(flow, label, num)
    guidance = check_guidance(flow, guidance)
    batch_size = min(batch_size, num)
    images = []
    for start in range(0, num, batch_size):
        index = np.arange(start, start + batch_size)
        part = None if labels is None else labels[np.minimum(index, num - 1)]
        images.append(
            np.asarray(
                _sample_batch(
                    flow, variables, key, jnp.asarray(index), part, guidance, temperature,
                    denoise, denoise > 0,
                )
            )
        )  # fmt: skip
    return np.concatenate(images)[:num]


@functools.partial(jax.jit, static_argnames=("flow", "denoising"))
def _sample_batch(
    flow, variables, key, index, label, guidance, temperature, denoise, denoising
) -> Float[Array, "B H W C"]:
    keys = keys_by_example(key, index)
    z = jax.vmap(lambda key: jax.random.normal(key, flow.latent_shape))(keys)
    z = z * temperature * jnp.sqrt(likelihood.prior_variance(variables))
    x, _ = flow.apply(variables, z, label, guidance, method="inverse")
    return denoised(flow, variables, x, label, denoise) if denoising else x


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
        z, logdet = cast(Any, flow.apply(variables, x, label, method="forward"))
        return -likelihood.nll(z, logdet).sum()

    return x + (std * flow.pixel_scale) ** 2 * jax.grad(log_prob)(x)


def quantise(pixels: Float[np.ndarray, "N H W C"], noise: str) -> UInt8[np.ndarray, "N H W C"]:
    """Pixel values to uint8: down after uniform dequantisation, else to the nearest."""
    whole = np.floor(pixels) if noise == "uniform" else np.rint(pixels)
    return np.nan_to_num(np.clip(whole, 0, 255)).astype(np.uint8)


def check_guidance(flow: Flow, guidance: Guidance | None) -> Guidance | None:
    """The guidance, or None where its strength is zero.

    Raises:
        UsageError: if it could have no effect on this flow, or is malformed.
    """
    if guidance is None or guidance.scale == 0:
        return None
    if guidance.what not in ("a", "b", "ab"):
        raise UsageError(
            f"guide_what is {guidance.what!r}; expected a (log-scale), b (shift) or ab (both)"
        )
    if guidance.temperature <= 0:
        raise UsageError(f"attention temperature is {guidance.temperature}; expected more than 0")
    if not flow.guidable:
        raise UsageError("guidance needs a TarFlow, as Jet's couplings define none; set it to 0")
    if not flow.num_classes and guidance.temperature == 1:
        raise UsageError(
            "guidance of a flow without labels needs an attention temperature other than 1, else "
            "both passes are the same; set attention_temperature, or guidance to 0"
        )
    return guidance
