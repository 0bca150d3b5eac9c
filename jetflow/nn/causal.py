"""The causal transformer of TarFlow's blocks (arXiv 2412.06329), with a KV cache."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.nn.transformer import KVCache, TransformerLayer, remat, uniform_init


def fan_in_uniform() -> nn.initializers.Initializer:
    """U(±1/√fan_in) for kernels, the initialisation of the published net's linear layers."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class CausalTransformer(nn.Module):
    """Causal layers over embedded tokens; `__call__` on all tokens, `extend` on some with a cache.

    Attributes:
        width, num_layers, num_heads: num_heads divides width.
        dtype: of the net.
        remat: a key of `REMAT_POLICIES`, applied to each layer of `__call__`.
    """

    width: int
    num_layers: int
    num_heads: int
    dtype: jnp.dtype
    remat: str

    def setup(self):
        self.layers = TransformerLayer(
            num_heads=self.num_heads,
            width=self.width,
            norm_epsilon=1e-5,
            approximate_gelu=False,
            kernel_init=fan_in_uniform(),
            bias_init=lambda fan_in: uniform_init(fan_in**-0.5),
            dtype=self.dtype,
        )

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        scanned = nn.scan(
            remat(lambda layer, x, _: (layer(x, causal=True), None), self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        return scanned(self.layers, x, None)[0]

    def empty_cache(self, batch: int, tokens: int, dtype: str | None = None) -> KVCache:
        """Room for so many tokens, by default in the dtype of the net."""
        zeros = jnp.zeros((self.num_layers, tokens, batch, self.width), dtype or self.dtype)
        return KVCache(zeros, zeros)

    def extend(
        self,
        x: Float[Array, "B S W"],
        cache: KVCache,
        start: Int[Array, ""],
        temperature: Float[Array, "B"],
    ) -> tuple[Float[Array, "B S W"], KVCache]:
        """The S tokens from `start` on, given the cache of those before."""

        def body(layer: TransformerLayer, carry, index):
            x, cache = carry
            return layer.extend(x, cache, index, start, temperature), None

        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": False})
        (x, cache), _ = scanned(self.layers, (x, cache), jnp.arange(self.num_layers))
        return x, cache
