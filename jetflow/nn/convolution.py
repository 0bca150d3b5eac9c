"""A convolutional layer in the place of a transformer layer, for comparison at equal size."""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jetflow.nn.transformer import Initializer, layer_norm, split_over_mesh

KERNEL = (3, 3)  # tokens, both odd


def neighbourhoods(x: Float[Array, "B R C W"]) -> Float[Array, "B R C F"]:
    """F features: those of the `KERNEL` of tokens around each, row by row; zeros beyond the border.

    A convolution is a matrix product with these, and that is how it is computed: XLA's gradient of
    a convolution takes fifty times as long on CPUs.
    """
    rows, columns = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in KERNEL), (0, 0)))
    offsets = itertools.product(*map(range, KERNEL))
    return jnp.concatenate([x[:, i : i + rows, j : j + columns] for i, j in offsets], axis=-1)


class ConvolutionLayer(nn.Module):
    """x + convolution(norm(x)), then x + mlp(norm(x)): a transformer layer without attention.

    The pattern is that of MetaFormer (arXiv 2111.11418), with a convolution for its token mixer. A
    transformer layer of width W has 12·W² weights, 4·W² of them in its attention. Here the
    convolution takes 9·W², so the MLP is 1.5 times as wide as the tokens, 3·W²: again 12·W².

    Attributes:
        grid: rows and columns of tokens; beyond its border are zeros.
        norm_epsilon: ε of both layer norms, which run in at least float32.
        kernel_init: initialiser of every kernel.
        dtype: of the products; parameters stay float32.
    """

    grid: tuple[int, int]
    norm_epsilon: float
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        width = x.shape[-1]
        x = split_over_mesh(x, "batch", None, None)
        options = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        norm_conv, norm_mlp = (
            layer_norm(self.norm_epsilon, self.dtype, name) for name in ("norm_conv", "norm_mlp")
        )
        around = neighbourhoods(norm_conv(x).reshape(-1, *self.grid, width))
        x = x + nn.Dense(width, name="conv", **options)(around).reshape(x.shape)
        hidden = nn.Dense(3 * width // 2, name="mlp_in", **options)(norm_mlp(x))
        hidden = jax.nn.gelu(split_over_mesh(hidden, "batch", None, "mlp"))
        return x + nn.Dense(width, name="mlp_out", **options)(hidden)
