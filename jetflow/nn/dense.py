"""Linear maps, and how they and what goes through them lie on the mesh.

The nets know axes by name alone: "batch", "heads" and "mlp" of activations, "embed" of kernels.
`sharding.on` says over which axes of the mesh each is split.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes, with_logical_constraint
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

Initializer = Callable[..., Array]
Axes: TypeAlias = tuple[str | None, ...]  # names of a kernel's axes
PRODUCT = "product"  # what recomputation in the backward pass may keep


def at_least_float32(dtype) -> jnp.dtype:
    """`dtype` where it is float32 or wider, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def split_over_mesh(x: Array, *axes: str | None) -> Array:
    """Lay `x` over the mesh by its axes' names: batch, heads, mlp or embed; without, as it was."""
    return with_logical_constraint(x, axes)


def mesh_axes(*axes: str | None) -> PartitionSpec:
    """The axes of the mesh that a program is traced for, by the names of an array's axes."""
    spec: Any = logical_to_mesh_axes(axes)
    return spec


def parts(axis: str) -> int:
    """Into how many parts the mesh that a program is traced for splits a named axis."""
    mesh = jax.sharding.get_abstract_mesh()
    (over,) = mesh_axes(axis)
    names = (over,) if isinstance(over, str) else over or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def side_by_side(init: Initializer) -> Initializer:
    """Initialise [I, K, O] as K independent [I, O] matrices, each with its own fan-out."""

    def stacked(key, shape, dtype=jnp.float32):
        inputs, count, outputs = shape
        keys = jax.random.split(key, count)
        return jnp.stack([init(k, (inputs, outputs), dtype) for k in keys], axis=1)

    return stacked


def matmul_precision() -> str | None:
    """That of `jax.default_matmul_precision`."""
    return getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009 (no type checker sees it)


class Dense(nn.Module):
    """x·kernel + bias, computed in `dtype`.

    Attributes:
        features: of the output, which may have several axes.
        axes: the names of the kernel's axes: "embed", and what the layer inside is split over.
    """

    features: tuple[int, ...]
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer
    axes: Axes

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], *self.features))
        bias = self.param("bias", self.bias_init, self.features).astype(self.dtype)
        return product(x.astype(self.dtype), kernel, self.axes) + bias


class TransposedDense(nn.Module):
    """A `Dense` whose kernel is given as [out, in], all axes of the output as one.

    For the few rows of a decoding step XLA's CPU backend multiplies from the left 1.4 to 1.7 times
    as fast. A barrier keeps it from making that a product from the right again.
    """

    features: tuple[int, ...]
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer
    axes: Axes  # as `Dense` has them; the kernel comes as it is to be used

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "..."]:
        shape = (x.shape[-1], *self.features)
        init = lambda key: self.kernel_init(key, shape).reshape(shape[0], -1).T  # noqa: E731
        kernel = self.param("kernel", init).astype(self.dtype)
        bias = self.param("bias", self.bias_init, self.features).astype(self.dtype)
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        product = jax.lax.platform_dependent(
            jnp.einsum("oi,ri->or", kernel, rows),
            cpu=jax.lax.optimization_barrier,
            default=lambda product: product,
        )
        return product.T.reshape(*x.shape[:-1], *self.features) + bias


def product(
    x: Float[Array, "B *T I"], kernel: Float[Array, "I *O"], axes: Axes
) -> Float[Array, "B ..."]:
    """x·kernel, in the dtype of x.

    Where the mesh splits "embed", the kernel is gathered for the product and its gradient is
    scattered after it. XLA's own way is a partial product for each part, which reads all
    activations for each of them.
    """
    is_even = len(x) % parts("batch") == 0 and all(
        axis is None or size % parts(axis) == 0
        for axis, size in zip(axes, kernel.shape, strict=True)
    )
    if parts("embed") == 1 or not is_even:
        result = jnp.tensordot(x, kernel.astype(x.dtype), axes=1)
    else:
        result = _gathered_product(x, kernel, axes, matmul_precision())
    return checkpoint_name(result, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gathered_product(x, kernel, axes: Axes, precision: str | None):
    return jnp.tensordot(x, _whole(kernel, x.dtype, axes), axes=1, precision=precision)


def _gathered_product_forward(x, kernel, axes: Axes, precision: str | None):
    return _gathered_product(x, kernel, axes, precision), (x, kernel)  # its part of the kernel


def _gathered_product_backward(axes: Axes, precision: str | None, kept, dy):
    x, kernel = kept
    outputs = tuple(range(1 - kernel.ndim, 0))  # axes of both
    whole = _whole(kernel, x.dtype, axes)
    dx = jnp.tensordot(dy, whole, axes=(outputs, outputs), precision=precision)
    gradient = _scattered_gradient(x, dy, axes, precision)
    return dx, gradient.astype(kernel.dtype)


_gathered_product.defvjp(_gathered_product_forward, _gathered_product_backward)


def _whole(kernel: Float[Array, "I *O"], dtype, axes: Axes) -> Float[Array, "I *O"]:
    """A kernel in `dtype`, gathered over the axis of the mesh that "embed" is split over."""
    part = split_over_mesh(kernel.astype(dtype), *axes)
    return split_over_mesh(part, *_without_embed(axes))


def _without_embed(axes: Axes) -> Axes:
    return tuple(None if axis == "embed" else axis for axis in axes)


def _scattered_gradient(x, dy, axes: Axes, precision: str | None) -> Float[Array, "I *O"]:
    """xᵀ·dy over all rows of the batch, each device with its part."""
    x = x.reshape(len(x), -1, x.shape[-1])
    dy = dy.reshape(*x.shape[:2], *dy.shape[1 - len(axes) :])
    batch, embed = (mesh_axes(name)[0] for name in ("batch", "embed"))
    inputs, *outputs = mesh_axes(*_without_embed(axes))
    place = axes.index("embed")

    def local(x, dy):
        gradient = jnp.tensordot(x, dy, axes=((0, 1), (0, 1)), precision=precision)
        gradient = jax.lax.psum_scatter(gradient, embed, scatter_dimension=place, tiled=True)
        return jax.lax.psum(gradient, [name for name in batch if name != embed])

    specs = PartitionSpec(batch, None, inputs), PartitionSpec(batch, None, *outputs)
    whole = mesh_axes(*axes)
    return jax.shard_map(local, in_specs=specs, out_specs=whole, check_vma=False)(x, dy)
