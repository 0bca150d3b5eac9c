"""What a net is told beside its tokens, as one embedding an image: the label, the noise level."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.nn.causal import KERNEL_INIT, bias_init

HIGHEST_PERIOD = 1e4  # of the sines of a noise level's logarithm, times 2π


def class_token(
    embedding: Float[Array, "Y W"],
    null: Float[Array, "W"],
    label: Int[Array, "B"] | Float[Array, "B Y"] | None,
    batch: int,
) -> Float[Array, "B W"]:
    """The embedding of each label; `null` for the label -1, or without labels.

    Of shares of the classes, their mixture.
    """
    if label is None:
        return jnp.broadcast_to(null, (batch, *null.shape))
    if label.ndim == 2:
        return label @ embedding
    return jnp.where(label[:, None] >= 0, embedding[jnp.maximum(label, 0)], null)


class LevelEmbedding(nn.Module):
    """MLP(f(log t)) of a noise level t, where f are sines and cosines (arXiv 2604.20041).

    With W/2 frequencies ω_k = exp(−ln(10⁴)·k/(W/2)), f(u) = [sin(ω·u), cos(ω·u)].

    Attributes:
        width: W, an even number.
    """

    width: int

    @nn.compact
    def __call__(self, noise_level: Float[Array, "B"] | None) -> Float[Array, "B W"]:
        assert noise_level is not None  # as the whole flow checks
        half = self.width // 2
        frequencies = jnp.exp(-math.log(HIGHEST_PERIOD) * jnp.arange(half) / half)
        angles = jnp.log(noise_level)[:, None] * frequencies
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for name, features in (("mlp_in", 4 * self.width), ("mlp_out", self.width)):
            bias = bias_init(x.shape[-1])
            x = nn.Dense(features, kernel_init=KERNEL_INIT, bias_init=bias, name=name)(x)
            x = jax.nn.gelu(x, approximate=False) if name == "mlp_in" else x
        return x
