"""TarFlow: autoregressive affine blocks over patches (arXiv 2412.06329)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.flows import affine
from jetflow.nn.causal import CausalTransformer, fan_in_uniform
from jetflow.nn.transformer import KVCache, at_least_float32, uniform_init
from jetflow.types import Guidance

EMBEDDING_INIT = nn.initializers.normal(stddev=1e-2)


class _Decoding(NamedTuple):
    """The carry of the sampling loop: the last decoded token, the caches, and the log-det."""

    token: Float[Array, "B D"]
    cache: KVCache
    logdet: Float[Array, "B"]


class AutoregressiveBlock(nn.Module):
    """z_i = (x_i − μ_i)·exp(−α_i), with (α_i, μ_i) predicted from the tokens before i.

    Attributes:
        token_shape: (T, D).
        width, num_layers, num_heads: of the causal transformer.
        num_classes: 0 for a block without class embedding.
        backward: decode the tokens from the last to the first.
        volume_preserving: predict no α; the log-determinant is 0.
        dtype, remat: of the net.
    """

    token_shape: tuple[int, int]
    width: int
    num_layers: int
    num_heads: int
    num_classes: int
    backward: bool
    volume_preserving: bool
    dtype: jnp.dtype
    remat: str

    def setup(self):
        tokens, features = self.token_shape
        wide = at_least_float32(self.dtype)
        self.proj_in = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=fan_in_uniform(),
            bias_init=uniform_init(features**-0.5),
        )
        self.position = self.param("position", EMBEDDING_INIT, (tokens, self.width), jnp.float32)
        if self.num_classes:
            shape = (self.num_classes, self.width)
            self.class_embedding = self.param("class_embedding", EMBEDDING_INIT, shape, jnp.float32)
        self.transformer = CausalTransformer(
            self.width, self.num_layers, self.num_heads, self.dtype, self.remat
        )
        self.proj_out = nn.Dense(
            features if self.volume_preserving else 2 * features,
            dtype=wide,
            kernel_init=nn.initializers.zeros_init(),
            bias_init=uniform_init(self.width**-0.5),
        )

    def forward(self, x: Float[Array, "B T D"], label: Int[Array, "B"] | None):
        """All tokens at once."""
        x = self._in_order(x)
        log_scale, shift = self._predict(x, label)
        z, logdet = affine.normalise(x, log_scale, shift)
        self.sow("intermediates", "output_scale", jnp.sqrt(jnp.mean(z**2)))
        return self._in_order(z), logdet

    def inverse(self, z: Float[Array, "B T D"], label, guidance: Guidance | None):
        """Token by token with a KV cache, in one scan of T − 1 steps.

        With guidance the conditional and the unconditional pass are two halves of one batch.
        """
        (z,) = affine.widen(self._in_order(z))
        batch, tokens, _ = z.shape
        passes = 1 if guidance is None else 2
        conditioning = self._class_token(label, batch)
        temperature = jnp.ones(batch)
        if guidance is not None:
            null = self._class_token(None, batch)
            conditioning = jnp.concatenate([conditioning, null])
            temperature = jnp.concatenate(
                [temperature, jnp.full(batch, guidance.temperature, temperature.dtype)]
            )
        embedding = self._in_order(self.position[None])[0]

        def body(block: AutoregressiveBlock, carry: _Decoding, inputs):
            index, position, next_z = inputs
            hidden = block.proj_in(jnp.tile(carry.token, (passes, 1)))
            hidden = hidden + (position + conditioning).astype(hidden.dtype)
            hidden, cache = block.transformer.step(hidden, carry.cache, index, temperature)
            log_scale, shift = block._split(block.proj_out(hidden))
            if guidance is not None:
                strength = guidance.scale * ((index + 1) / (tokens - 1) if guidance.annealed else 1)
                log_scale = _guide(log_scale, strength, "a" in guidance.what)
                shift = _guide(shift, strength, "b" in guidance.what)
            token, logdet = affine.denormalise(next_z[:, None], log_scale[:, None], shift[:, None])
            return _Decoding(token[:, 0], cache, carry.logdet + logdet), token[:, 0]

        # Token 0 has no past: its shift and log-scale are zero.
        cache = self.transformer.empty_cache(passes * batch, tokens)
        carry = _Decoding(z[:, 0], cache, jnp.zeros(batch, z.dtype))
        scanned = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        inputs = (jnp.arange(tokens - 1), embedding[:-1], z[:, 1:].swapaxes(0, 1))
        carry, rest = scanned(self, carry, inputs)
        x = jnp.concatenate([z[:, :1], rest.swapaxes(0, 1)], axis=1)
        return self._in_order(x), carry.logdet

    def _predict(self, x, label):
        """Log-scale and shift of every token: the net's outputs, shifted by one token."""
        # Summed before it is rounded to the net's dtype, as in `inverse`.
        embedding = self._in_order(self.position[None]) + self._class_token(label, len(x))[:, None]
        hidden = self.proj_in(x) + embedding.astype(self.dtype)
        out = self.proj_out(self.transformer(hidden))
        out = jnp.pad(out[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return self._split(out)

    def _split(self, out):
        if self.volume_preserving:
            return jnp.zeros_like(out), out
        return jnp.split(out, 2, axis=-1)

    def _class_token(self, label: Int[Array, "B"] | None, batch: int) -> Float[Array, "B W"]:
        """The embedding of the label; of a dropped or absent one, the mean over the classes."""
        if not self.num_classes:
            return jnp.zeros((batch, self.width))
        mean = self.class_embedding.mean(axis=0)
        if label is None:
            return jnp.broadcast_to(mean, (batch, self.width))
        return jnp.where(
            label[:, None] >= 0, self.class_embedding[jnp.maximum(label, 0)], mean[None]
        )

    def _in_order(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Between image order and decoding order; its own inverse."""
        return tokens[:, ::-1] if self.backward else tokens


def _guide(prediction: Float[Array, "P D"], strength, guided: bool) -> Float[Array, "P//2 D"]:
    """c + g·(c − u) of the stacked conditional and unconditional predictions."""
    conditional, unconditional = jnp.split(prediction, 2)
    if not guided:
        return conditional
    return conditional + strength * (conditional - unconditional)
