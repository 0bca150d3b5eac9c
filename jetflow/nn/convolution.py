"""A convolutional layer in the place of a transformer layer, for comparison at equal size."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jetflow.nn.transformer import Initializer, at_least_float32, split_over_mesh

KERNEL = (3, 3)  # tokens


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
        laid_out = self._norm("norm_conv")(x).reshape(-1, *self.grid, width)
        options = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        x = x + nn.Conv(width, KERNEL, name="conv", **options)(laid_out).reshape(x.shape)
        hidden = nn.Dense(3 * width // 2, name="mlp_in", **options)(self._norm("norm_mlp")(x))
        hidden = jax.nn.gelu(split_over_mesh(hidden, "batch", None, "mlp"))
        return x + nn.Dense(width, name="mlp_out", **options)(hidden)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(
            self.norm_epsilon,
            dtype=at_least_float32(self.dtype),
            use_fast_variance=False,
            name=name,
        )
