"""The causal transformer of TarFlow's blocks (arXiv 2412.06329), with a KV cache."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.nn.transformer import KVCache, TransformerLayer, through_layers, uniform_init

Cache: TypeAlias = tuple[KVCache, ...]  # one a layer


def fan_in_uniform() -> nn.initializers.Initializer:
    """U(±1/√fan_in) for kernels, the initialisation of the published net's linear layers."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class CausalTransformer(nn.Module):
    """Causal layers over embedded tokens; `__call__` on all tokens, `extend` on some with a cache.

    Attributes:
        width, num_layers, num_heads: num_heads divides width.
        dtype: of the net.
        remat, scan: of the layers of `__call__`, see `through_layers`.
    """

    width: int
    num_layers: int
    num_heads: int
    dtype: jnp.dtype
    remat: str
    scan: bool

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
        return through_layers(
            self.layers,
            x,
            num_layers=self.num_layers,
            causal=True,
            remat=self.remat,
            scan=self.scan,
        )

    def empty_cache(self, batch: int, tokens: int, dtype: str | None = None) -> Cache:
        """Room for so many tokens, by default in the dtype of the net."""
        shape = (batch, self.num_heads, tokens, self.width // self.num_heads)
        zeros = jnp.zeros(shape, dtype or self.dtype)
        return (KVCache(zeros, zeros),) * self.num_layers

    def layer_params(self) -> tuple[Any, ...]:
        """The parameters of each layer, for `extend`: a loop would cut them out at each token."""
        stacked = self.layers.variables["params"]
        return tuple(
            jax.tree.map(lambda array, index=index: array[index], stacked)
            for index in range(self.num_layers)
        )

    def extend(
        self,
        x: Float[Array, "B S W"],
        cache: Cache,
        start: Int[Array, ""],
        temperature: Float[Array, "B"],
        layer_params: tuple[Any, ...],
    ) -> tuple[Float[Array, "B S W"], Cache]:
        """The S tokens from `start` on, given the cache of those before."""
        layer, caches = self.layers.clone(parent=None), []
        for params, old in zip(layer_params, cache, strict=True):
            x, new = layer.apply({"params": params}, x, old, start, temperature, method="extend")
            caches.append(new)
        return x, tuple(caches)
