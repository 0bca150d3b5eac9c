"""Guidance of an autoregressive block: a conditional and an unconditional prediction made one."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jetflow.types import Guidance


class Prediction(NamedTuple):
    """The affine map x = z·exp(log_scale) + shift that a net predicts of each token.

    Attributes:
        sign: −1 where a guided scale is negative; None where none can be.
    """

    log_scale: Float[Array, "P S D"]
    shift: Float[Array, "P S D"]
    sign: Float[Array, "P S D"] | None = None


def interleave(conditional: Float[Array, "B *S"], unconditional: Float[Array, "B *S"]):
    """Rows c₀ u₀ c₁ u₁ …"""
    stacked = jnp.stack([conditional, unconditional], axis=1)
    return stacked.reshape(-1, *conditional.shape[1:])


def guided(predicted: Prediction, guidance: Guidance, strength) -> Prediction:
    """One prediction from interleaved rows of both passes, by the rule of `guidance`.

    Args:
        strength: g, of all tokens or of each.
    """
    conditional, unconditional = (
        Prediction(*(array.reshape(-1, 2, *array.shape[1:])[:, row] for array in predicted[:2]))
        for row in (0, 1)
    )
    log_scale, shift, sign = _RULES[guidance.rule](conditional, unconditional, strength)
    if "a" not in guidance.what:
        log_scale, sign = conditional.log_scale, None
    return Prediction(log_scale, shift if "b" in guidance.what else conditional.shift, sign)


def _beyond(conditional, unconditional, strength):
    """c + g·(c − u)."""
    return conditional + strength * (conditional - unconditional)


def _log_scale(c: Prediction, u: Prediction, strength) -> Prediction:
    return Prediction(
        _beyond(c.log_scale, u.log_scale, strength), _beyond(c.shift, u.shift, strength)
    )


def _scale(c: Prediction, u: Prediction, strength) -> Prediction:
    scale = _beyond(jnp.exp(c.log_scale), jnp.exp(u.log_scale), strength)
    return Prediction(jnp.log(jnp.abs(scale)), _beyond(c.shift, u.shift, strength), jnp.sign(scale))


def _starflow(c: Prediction, u: Prediction, strength) -> Prediction:
    """The normal distribution of density c·(c/u)^g, where u counts as no narrower than c."""
    share = strength * jnp.exp(2 * jnp.minimum(c.log_scale - u.log_scale, 0))
    precision = 1 + strength - share  # in units of that of c
    shift = ((1 + strength) * c.shift - share * u.shift) / precision
    return Prediction(c.log_scale - jnp.log(precision) / 2, shift)


_RULES = {"log_scale": _log_scale, "scale": _scale, "starflow": _starflow}
