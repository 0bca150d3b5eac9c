"""The two element-wise affine maps, each with both directions and its log-determinant.

They run in at least float32, whatever the net that predicts their parameters runs in.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jetflow.nn.transformer import at_least_float32

TokensAndLogDet = tuple[Float[Array, "B T D"], Float[Array, "B"]]


def widen(*arrays: Array) -> list[Array]:
    """The arrays in their common dtype, or in float32 where that is narrower."""
    dtype = at_least_float32(jnp.result_type(*arrays))
    return [array.astype(dtype) for array in arrays]


def root_mean_square(x: Float[Array, "B T D"]) -> Float[Array, ""]:
    """The root mean square of x, as a statistic: without a gradient."""
    return jnp.sqrt(jnp.mean(jax.lax.stop_gradient(x) ** 2))


def normalise(x, log_scale, shift) -> TokensAndLogDet:
    """z = (x − shift)·exp(−log_scale): the autoregressive map of TarFlow."""
    x, log_scale, shift = widen(x, log_scale, shift)
    return (x - shift) * jnp.exp(-log_scale), -log_scale.sum((1, 2))


def denormalise(z, log_scale, shift, sign=None) -> TokensAndLogDet:
    """x = z·exp(log_scale) + shift: the inverse of `normalise`; sign, if given, is of the scale."""
    z, log_scale, shift = widen(z, log_scale, shift)
    scale = jnp.exp(log_scale) if sign is None else sign * jnp.exp(log_scale)
    return z * scale + shift, log_scale.sum((1, 2))


def squash(x, bias, gate, limit: float) -> TokensAndLogDet:
    """y = (x + bias)·limit·sigmoid(gate): the coupling map of Jet.

    The log-determinant of a dimension is less than log(limit).
    """
    x, bias, gate = widen(x, bias, gate)
    log_scale = jax.nn.log_sigmoid(gate) + math.log(limit)
    return (x + bias) * jnp.exp(log_scale), log_scale.sum((1, 2))


def unsquash(y, bias, gate, limit: float) -> TokensAndLogDet:
    """x = y / (limit·sigmoid(gate)) − bias: the inverse of `squash`."""
    y, bias, gate = widen(y, bias, gate)
    log_scale = jax.nn.log_sigmoid(gate) + math.log(limit)
    return y * jnp.exp(-log_scale) - bias, -log_scale.sum((1, 2))
