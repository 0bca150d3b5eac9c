"""The causal transformer of TarFlow's blocks (arXiv 2412.06329), with a KV cache."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from jetflow.nn.attention import Cached, KVCache
from jetflow.nn.dense import Initializer, TransposedDense
from jetflow.nn.transformer import TransformerLayer, through_layers

Cache: TypeAlias = tuple[KVCache, ...]  # one a layer

# U(±1/√fan_in), the initialisation of the published net's linear layers, biases included.
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def enlarged(cache: Cache, tokens: int) -> Cache:
    """The cache with room for so many tokens."""
    more = lambda a: jnp.zeros((*a.shape[:2], tokens - a.shape[2], *a.shape[3:]), a.dtype)  # noqa: E731
    return jax.tree.map(lambda a: jnp.concatenate([a, more(a)], axis=2), cache)


class CausalTransformer(nn.Module):
    """Causal layers over embedded tokens; `__call__` on all tokens, `extend` on some with a cache.

    Attributes:
        width, num_layers, num_heads: num_heads divides width.
        dtype: of the net.
        attention: of `__call__`, as `attention.choose` takes it.
        remat, scan: of the layers of `__call__`, see `through_layers`.
    """

    width: int
    num_layers: int
    num_heads: int
    dtype: jnp.dtype
    attention: str
    remat: str
    scan: bool

    def setup(self):
        self.layers = TransformerLayer(
            num_heads=self.num_heads,
            width=self.width,
            norm_epsilon=1e-5,
            approximate_gelu=False,
            causal=True,
            kernel_init=KERNEL_INIT,
            bias_init=bias_init,
            dtype=self.dtype,
            attention=self.attention,
        )

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        return through_layers(
            self.layers, x, num_layers=self.num_layers, remat=self.remat, scan=self.scan
        )

    def empty_cache(self, batch: int, tokens: int, dtype: str | None = None) -> Cache:
        """Room for so many tokens, by default in the dtype of the net."""
        head_dim = self.width // self.num_heads
        cached = Cached.empty(batch, self.num_heads, tokens, head_dim, dtype or self.dtype)
        return (KVCache(cached, cached),) * self.num_layers

    def layer_params(self) -> tuple[Any, ...]:
        """The parameters of each layer, for `extend`: a loop would cut them out at each token.

        Kernels as `TransposedDense` takes them, in the dtype of the net.
        """
        stacked: Any = flatten_dict(self.layers.variables["params"])
        for path in stacked:
            if path[-1] == "kernel":
                kernels = stacked[path].astype(self.dtype)
                stacked[path] = kernels.reshape(*kernels.shape[:2], -1).swapaxes(1, 2)
        return tuple(
            unflatten_dict({path: array[index] for path, array in stacked.items()})
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
        layer, caches = self.layers.clone(parent=None, dense=TransposedDense), []
        for params, old in zip(layer_params, cache, strict=True):
            x, new = _extend_layer(layer, params, x, old, start, temperature)
            caches.append(new)
        return x, tuple(caches)


@functools.partial(jax.jit, static_argnames="layer")
def _extend_layer(layer, params, x, cache: KVCache, start, temperature):
    """Of any layer: it is traced once for all layers and blocks of a shape, which takes seconds."""
    return layer.apply({"params": params}, x, cache, start, temperature, method="extend")
