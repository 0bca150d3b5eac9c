"""The nets of Jet's coupling layers (arXiv 2412.15129): a Vision Transformer, or convolutions."""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jetflow.nn.condition import LevelEmbedding, class_token
from jetflow.nn.dense import Dense, at_least_float32, split_over_mesh
from jetflow.nn.transformer import TransformerLayer, layer_norm, through_layers
from jetflow.types import Condition

NORM_EPSILON = 1e-6
KERNEL = (3, 3)  # tokens of a convolution, both odd
KERNEL_INIT = nn.initializers.xavier_uniform()


class Encoder(nn.Module):
    """A net from tokens to tokens: position embedding, layers, norm, zero-init output.

    With classes, the embedding of the label is added to every token; `NO_LABEL` adds nothing. So is
    that of the noise level, if the net is told it.

    Attributes:
        net: "vit", or "conv": layers that mix the tokens by convolution in place of attention.
        grid: rows and columns of tokens, as "conv" sees them.
        width: of the tokens.
        num_layers, num_heads: of the transformer; num_heads divides width.
        out_features: features of an output token; the output layer starts at zero.
        num_classes: 0 for a net without class embedding.
        dtype: of the net; the output is computed in at least float32.
        attention: of "vit", as `attention.choose` takes it.
        remat, scan: of the layers, see `through_layers`.
        noise_conditional: embed the noise level as well.
    """

    net: str
    grid: tuple[int, int]
    width: int
    num_layers: int
    num_heads: int
    out_features: int
    num_classes: int
    dtype: jnp.dtype
    attention: str
    remat: str
    scan: bool
    noise_conditional: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], condition: Condition) -> Float[Array, "B T F"]:
        embedding_init = nn.initializers.normal(stddev=self.width**-0.5)
        position = self.param("position", embedding_init, (x.shape[1], self.width), jnp.float32)
        x = nn.Dense(self.width, dtype=self.dtype, name="proj_in")(x)
        x = x + position.astype(x.dtype)
        if self.num_classes:
            shape = (self.num_classes, self.width)
            embedding = self.param("class_embedding", embedding_init, shape, jnp.float32)
            token = class_token(embedding, jnp.zeros(self.width), condition.label, len(x))
            x = x + token[:, None].astype(x.dtype)
        if self.noise_conditional:
            level = LevelEmbedding(self.width, name="level_embedding")(condition.noise_level)
            x = x + level[:, None].astype(x.dtype)
        x = through_layers(
            self._layer(), x, num_layers=self.num_layers, remat=self.remat, scan=self.scan
        )
        x = layer_norm(NORM_EPSILON, self.dtype, "norm")(x)
        dtype, zeros = at_least_float32(self.dtype), nn.initializers.zeros_init()
        return nn.Dense(self.out_features, dtype=dtype, kernel_init=zeros, name="proj_out")(x)

    def _layer(self) -> nn.Module:
        if self.net == "conv":
            return ConvolutionLayer(self.grid, self.dtype, name="layers")
        return TransformerLayer(
            num_heads=self.num_heads,
            width=self.width,
            causal=False,
            norm_epsilon=NORM_EPSILON,
            approximate_gelu=True,
            kernel_init=KERNEL_INIT,
            bias_init=lambda fan_in: nn.initializers.normal(stddev=1e-6),
            dtype=self.dtype,
            attention=self.attention,
            name="layers",
        )


class ConvolutionLayer(nn.Module):
    """x + convolution(norm(x)), then x + mlp(norm(x)): a transformer layer without attention.

    The pattern is that of MetaFormer (arXiv 2111.11418), with a convolution for its token mixer. A
    transformer layer of width W has 12·W² weights, 4·W² of them in its attention. Here the
    convolution takes 9·W², so the MLP is 1.5 times as wide as the tokens, 3·W²: again 12·W².

    Attributes:
        grid: rows and columns of tokens; beyond its border are zeros.
        dtype: of the products; parameters stay float32.
    """

    grid: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        width = x.shape[-1]
        x = split_over_mesh(x, "batch", None, None)
        options = (self.dtype, KERNEL_INIT, nn.initializers.zeros_init())
        norm_conv, norm_mlp = (
            layer_norm(NORM_EPSILON, self.dtype, name) for name in ("norm_conv", "norm_mlp")
        )
        around = neighbourhoods(norm_conv(x).reshape(-1, *self.grid, width))
        x = x + Dense((width,), *options, ("embed", None), name="conv")(around).reshape(x.shape)
        hidden = Dense((3 * width // 2,), *options, ("embed", "mlp"), name="mlp_in")(norm_mlp(x))
        hidden = jax.nn.gelu(split_over_mesh(hidden, "batch", None, "mlp"))
        return x + Dense((width,), *options, ("mlp", "embed"), name="mlp_out")(hidden)


def neighbourhoods(x: Float[Array, "B R C W"]) -> Float[Array, "B R C F"]:
    """The features of the tokens in a `KERNEL` around each, row by row; zeros beyond the border.

    A convolution is a matrix product with these, and that is how it is computed: XLA's gradient of
    a convolution takes fifty times as long on CPUs.
    """
    rows, columns = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in KERNEL), (0, 0)))
    offsets = itertools.product(*map(range, KERNEL))
    return jnp.concatenate([x[:, i : i + rows, j : j + columns] for i, j in offsets], axis=-1)
