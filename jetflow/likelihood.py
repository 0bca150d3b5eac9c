"""From latents to likelihoods: the prior, nats per example, bits per dimension."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jetflow.types import AnyArray, Condition, Flow

Variance = Float[AnyArray, "T D"] | float


def prior_variance(variables) -> Variance:
    """The prior's variance: learned by volume-preserving flows, else 1."""
    return variables.get("prior", {}).get("variance", 1.0)


def prior_nll(z: Float[Array, "B T D"], variance: Variance = 1.0) -> Float[Array, "B"]:
    """−log N(z; 0, variance) in nats, summed over the dimensions."""
    terms = z**2 / variance + jnp.log(2 * math.pi * jnp.asarray(variance, z.dtype))
    return 0.5 * terms.sum((1, 2))


def nll(
    z: Float[Array, "B T D"], logdet: Float[Array, "B"], variance: Variance = 1.0
) -> Float[Array, "B"]:
    """−log p(x) in nats, by the change of variables."""
    return prior_nll(z, variance) - logdet


def bits_per_dim(nats: Float[Array, "B"], z: Float[Array, "B T D"]) -> Float[Array, "B"]:
    """Nats of an example to bits per dimension of its latent z."""
    return nats / (math.prod(z.shape[1:]) * math.log(2))


def eval_step(
    flow: Flow, variables: Any, x: Float[Array, "B *X"], condition: Condition
) -> Float[Array, "B"]:
    """Bits per dimension of each example, at given pixel values."""
    return eval_parts(flow, variables, x, condition)[0]


def eval_parts(
    flow: Flow, variables: Any, x: Float[Array, "B *X"], condition: Condition
) -> tuple[Float[Array, "B"], Float[Array, "P B"]]:
    """Bits per dimension of each example, and what each part of the flow contributes to them.

    The parts are the prior, the preprocessing, and the blocks in the order in which an image goes
    through them; of a Jet, its couplings. They add up to the whole.
    """
    z, logdet, block_logdets, _ = flow.apply(variables, x, *condition, method="forward_blocks")
    variance = prior_variance(variables)
    pixels = jnp.full((1, *logdet.shape), flow.pixel_logdet, logdet.dtype)
    parts = jnp.concatenate([prior_nll(z, variance)[None], -pixels, -block_logdets])
    bits = bits_per_dim(nll(z, logdet, variance), z)
    return bits, jax.vmap(lambda part: bits_per_dim(part, z))(parts)


def importance_weighted(
    bits: Float[np.ndarray, "K *N"], dimensions: int
) -> Float[np.ndarray, "*N"]:
    """−log2 of the mean over K draws of p, per dimension, from −log2 p per dimension of each draw.

    The noise of the draws is the proposal: a bound on the bits of the discrete image that is never
    above the mean of `bits`, and the tighter the more draws (arXiv 1509.00519, Eq. 8).
    """
    nats = -np.asarray(bits, np.float64) * dimensions * math.log(2)
    mean = np.logaddexp.reduce(nats, axis=0) - math.log(len(nats))
    return -mean / (dimensions * math.log(2))
