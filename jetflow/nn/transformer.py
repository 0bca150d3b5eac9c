"""The pre-layer-norm transformer layer that both nets are made of.

The two published nets differ in the layer-norm epsilon, the form of GELU and the initialisation;
`encoder.py` and `causal.py` state their choices.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.nn.attention import KVCache, attend, attend_cached
from jetflow.nn.dense import (
    PRODUCT,
    Axes,
    Dense,
    Initializer,
    at_least_float32,
    side_by_side,
    split_over_mesh,
)

# What the backward pass keeps of a layer: everything, the weight matmuls' results, or its input;
# or, of a whole coupling or block of layers, its input alone.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "block": None,
}


def through_layers(
    layer: nn.Module,
    x: Float[Array, "B T W"],
    *,
    num_layers: int,
    remat: str,
    scan: bool,
) -> Float[Array, "B T W"]:
    """x through so many layers like `layer`, whose parameters are stacked on a first axis.

    Args:
        remat: a key of `REMAT_POLICIES`.
        scan: let the program loop over the layers, instead of holding each of them.
    """

    def body(layer, x, _):
        return layer(x), None

    if policy := REMAT_POLICIES[remat]:  # a loop already prevents that programs share what is equal
        body = nn.remat(body, policy=policy, prevent_cse=not scan)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num_layers,
        unroll=1 if scan else num_layers,
    )
    return scanned(layer, x, None)[0]


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """In float32 or wider, with the variance as the mean square of what the mean leaves."""
    dtype = at_least_float32(dtype)
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: Float[Array, "..."], approximate: bool) -> Float[Array, "..."]:
    """GELU, in its tanh form or, not approximate, its erf form."""
    return jax.nn.gelu(x, approximate=True) if approximate else _erf_gelu(x)


@jax.custom_jvp
def _erf_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """In at least float32, as PyTorch computes it. For the gradient, the slope alone is kept.

    JAX's own computes 1 + erf as an erfc, for the sake of narrow dtypes. That takes twice the time
    on CPUs, and GPUs read and write its parts several times.
    """
    return _erf_gelu_and_slope(x)[0]


@_erf_gelu.defjvp
def _erf_gelu_jvp(primals, tangents):
    value, slope = _erf_gelu_and_slope(*primals)
    return value, slope * tangents[0]


def _erf_gelu_and_slope(x: Array) -> tuple[Array, Array]:
    wide = x.astype(at_least_float32(x.dtype))
    share = (1 + jax.lax.erf(wide * math.sqrt(0.5))) / 2
    density = jnp.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
    return (wide * share).astype(x.dtype), (share + wide * density).astype(x.dtype)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with an MLP of four times the width.

    Attributes:
        num_heads: attention heads; must divide the width.
        norm_epsilon: ε of both layer norms, which run in at least float32.
        approximate_gelu: the tanh form of GELU, else the erf form.
        causal: token i sees tokens ≤ i, else all.
        kernel_init: initialiser of every kernel.
        bias_init: fan-in → initialiser of the biases.
        dtype: of the matmuls; parameters stay float32.
        attention: the form that `attention.choose` takes.
        dense: the module of the linear maps.
    """

    num_heads: int
    width: int
    norm_epsilon: float
    approximate_gelu: bool
    causal: bool
    kernel_init: Initializer
    bias_init: Callable[[int], Initializer]
    dtype: jnp.dtype
    attention: str = "auto"
    dense: type[nn.Module] = Dense

    def setup(self):
        width = self.width
        self.norm_attention = layer_norm(self.norm_epsilon, self.dtype)
        # Query, key and value on an axis of their own: of a head, all lie on the same devices.
        qkv_init, qkv_axes = side_by_side(self.kernel_init), ("embed", None, "heads")
        self.qkv = self._dense((3, width), width, qkv_init, qkv_axes)
        self.out = self._dense((width,), width, self.kernel_init, ("heads", "embed"))
        self.norm_mlp = layer_norm(self.norm_epsilon, self.dtype)
        self.mlp_in = self._dense((4 * width,), width, self.kernel_init, ("embed", "mlp"))
        self.mlp_out = self._dense((width,), 4 * width, self.kernel_init, ("mlp", "embed"))

    def _dense(
        self,
        features: tuple[int, ...],
        fan_in: int,
        kernel_init: Initializer,
        axes: Axes,
    ) -> nn.Module:
        return self.dense(features, self.dtype, kernel_init, self.bias_init(fan_in), axes)

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        """All tokens at once."""
        batch, tokens, width = x.shape
        x = split_over_mesh(x, "batch", None, None)
        qkv = self.qkv(self.norm_attention(x))
        heads = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (
            split_over_mesh(part.reshape(heads), "batch", None, "heads", None)
            for part in jnp.split(qkv, 3, axis=-2)
        )
        mixed = attend(query, key, value, causal=self.causal, method=self.attention)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.mlp(x)

    def extend(
        self,
        x: Float[Array, "B S W"],
        cache: KVCache,
        start: Int[Array, ""],
        temperature: Float[Array, "B"],
    ) -> tuple[Float[Array, "B S W"], KVCache]:
        """The S tokens from `start` on; each sees the cached ones before them, and causally itself.

        What the cache held of these positions is replaced. The attention logits of row b are
        divided by temperature[b].
        """
        x = split_over_mesh(x, "batch", None, None)
        qkv = self.qkv(self.norm_attention(x)).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        cache = KVCache(cache.key.written(key, start), cache.value.written(value, start))
        tokens = jnp.arange(cache.key.entries.shape[2])
        visible = tokens <= start + jnp.arange(x.shape[1])[:, None]
        mixed = attend_cached(query, cache, visible, temperature)
        x = x + self.out(mixed.swapaxes(1, 2).reshape(x.shape))
        return x + self.mlp(x), cache

    def mlp(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        hidden = split_over_mesh(self.mlp_in(self.norm_mlp(x)), "batch", None, "mlp")
        return self.mlp_out(gelu(hidden, self.approximate_gelu))
