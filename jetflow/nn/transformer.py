"""The pre-layer-norm transformer layer that both nets are made of.

The two published nets differ in the layer-norm epsilon, the form of GELU and the initialisation;
`encoder.py` and `causal.py` state their choices.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Float, Int

from jetflow.nn import attention
from jetflow.nn.attention import KVCache, attend, attend_cached

Initializer = Callable[..., Array]
Axes: TypeAlias = tuple[str | None, str | None]  # names of a kernel's two axes

# What the backward pass keeps of a layer: everything, the weight matmuls' results, or its input;
# or, of a whole coupling or block of layers, its input alone.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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


def at_least_float32(dtype) -> jnp.dtype:
    """`dtype` where it is float32 or wider, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """In float32 or wider, with the variance as the mean square of what the mean leaves."""
    dtype = at_least_float32(dtype)
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def split_over_mesh(x: Array, *axes: str | None) -> Array:
    """Lay `x` over the mesh by its axes' names: batch, heads, mlp or embed; without, as it was."""
    return with_logical_constraint(x, axes)


def class_token(
    embedding: Float[Array, "Y W"],
    null: Float[Array, "W"],
    label: Int[Array, "B"] | None,
    batch: int,
) -> Float[Array, "B W"]:
    """The embedding of each label; `null` for the label -1, or without labels."""
    if label is None:
        return jnp.broadcast_to(null, (batch, *null.shape))
    return jnp.where(label[:, None] >= 0, embedding[jnp.maximum(label, 0)], null)


def side_by_side(init: Initializer, count: int) -> Initializer:
    """Initialise [N, count·M] as `count` independent [N, M] matrices, each with its own fan-out."""

    def stacked(key, shape, dtype=jnp.float32):
        part = (*shape[:-1], shape[-1] // count)
        keys = jax.random.split(key, count)
        return jnp.concatenate([init(k, part, dtype) for k in keys], axis=-1)

    return stacked


def product(x: Float[Array, "B *T I"], kernel: Float[Array, "I O"], axes: Axes) -> Array:
    """x·kernel, in the dtype of x.

    Where the mesh splits "embed", the kernel is gathered for the product and its gradient is
    scattered after it. XLA's own way is a partial product for each part, which reads all
    activations for each of them.
    """
    if attention.parts("embed") == 1:
        return x @ kernel.astype(x.dtype)
    return _gathered_product(x, kernel, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gathered_product(x, kernel, axes: Axes):
    return x @ _whole(kernel, x.dtype, axes)


def _gathered_product_forward(x, kernel, axes: Axes):
    return _gathered_product(x, kernel, axes), (x, kernel)  # of the kernel a part is kept


def _gathered_product_backward(axes: Axes, kept, dy):
    x, kernel = kept
    dx = dy @ _whole(kernel, x.dtype, axes).T
    return dx, _scattered_gradient(x, dy, axes).astype(kernel.dtype)


_gathered_product.defvjp(_gathered_product_forward, _gathered_product_backward)


def _whole(kernel: Float[Array, "I O"], dtype, axes: Axes) -> Float[Array, "I O"]:
    """A kernel in `dtype`, gathered over the axis of the mesh that "embed" is split over."""
    part = split_over_mesh(kernel.astype(dtype), *axes)
    return split_over_mesh(part, *(None if axis == "embed" else axis for axis in axes))


def _scattered_gradient(x, dy, axes: Axes) -> Float[Array, "I O"]:
    """xᵀ·dy over all rows of the batch, each device with its part."""
    x, dy = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, dy))
    (batch,), (embed,) = (nn.logical_to_mesh_axes((name,)) for name in ("batch", "embed"))
    inputs, outputs = nn.logical_to_mesh_axes(
        tuple(None if axis == "embed" else axis for axis in axes)
    )

    def local(x, dy):
        gradient = jnp.einsum("bti,bto->io", x, dy)
        others = [name for name in batch if name != embed]
        gradient = jax.lax.psum_scatter(
            gradient, embed, scatter_dimension=axes.index("embed"), tiled=True
        )
        return jax.lax.psum(gradient, others)

    specs = (
        jax.sharding.PartitionSpec(batch, None, inputs),
        jax.sharding.PartitionSpec(batch, None, outputs),
    )
    out = nn.logical_to_mesh_axes(axes)
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(x, dy)


class Dense(nn.Module):
    """x·kernel + bias, computed in `dtype`.

    Attributes:
        axes: the names of the kernel's axes: "embed", and what the layer inside is split over.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer
    axes: Axes

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return product(x.astype(self.dtype), kernel, self.axes) + bias


class TransposedDense(nn.Module):
    """An `nn.Dense` whose kernel is given as [out, in].

    For the few rows of a decoding step XLA's CPU backend multiplies from the left 1.4 to 1.7 times
    as fast. A barrier keeps it from making that a product from the right again.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer
    axes: Axes  # as `Dense` has them; the kernel comes as it is to be used

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", lambda key: self.kernel_init(key, shape).T).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        product = jax.lax.platform_dependent(
            jnp.einsum("oi,ri->or", kernel, rows),
            cpu=jax.lax.optimization_barrier,
            default=lambda product: product,
        )
        return product.T.reshape(*x.shape[:-1], self.features) + bias


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
        qkv_init = side_by_side(self.kernel_init, 3)
        self.qkv = self._dense(3 * width, width, qkv_init, ("embed", "heads"))
        self.out = self._dense(width, width, self.kernel_init, ("heads", "embed"))
        self.norm_mlp = layer_norm(self.norm_epsilon, self.dtype)
        self.mlp_in = self._dense(4 * width, width, self.kernel_init, ("embed", "mlp"))
        self.mlp_out = self._dense(width, 4 * width, self.kernel_init, ("mlp", "embed"))

    def _dense(
        self,
        features: int,
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
            for part in jnp.split(qkv, 3, axis=-1)
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
        cache = KVCache(_written(cache.key, key, start), _written(cache.value, value, start))
        tokens = jnp.arange(cache.key.shape[2])
        visible = tokens <= start + jnp.arange(x.shape[1])[:, None]
        mixed = attend_cached(query, cache, visible, temperature)
        x = x + self.out(mixed.swapaxes(1, 2).reshape(x.shape))
        return x + self.mlp(x), cache

    def mlp(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        hidden = split_over_mesh(self.mlp_in(self.norm_mlp(x)), "batch", None, "mlp")
        return self.mlp_out(jax.nn.gelu(hidden, approximate=self.approximate_gelu))


def _written(
    cache: Float[Array, "B N T H"], new: Float[Array, "B N S H"], start: Array
) -> Float[Array, "B N T H"]:
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=2)
