"""The nets of Jet's coupling layers (arXiv 2412.15129): a Vision Transformer, or convolutions."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.nn.convolution import ConvolutionLayer
from jetflow.nn.transformer import TransformerLayer, at_least_float32, layer_norm, through_layers

NORM_EPSILON = 1e-6


class Encoder(nn.Module):
    """Vision Transformer from tokens to tokens: position embedding, layers, norm, zero-init output.

    With classes, the embedding of the label is added to every token; `NO_LABEL` adds nothing.

    Attributes:
        net: "vit", or "conv": layers that mix the tokens by convolution in place of attention.
        grid: rows and columns of tokens, as "conv" sees them.
        width: of the tokens.
        num_layers, num_heads: of the transformer; num_heads divides width.
        out_features: features of an output token; the output layer starts at zero.
        num_classes: 0 for a net without class embedding.
        dtype: of the net; the output is computed in at least float32.
        remat, scan: of the layers, see `through_layers`.
    """

    net: str
    grid: tuple[int, int]
    width: int
    num_layers: int
    num_heads: int
    out_features: int
    num_classes: int
    dtype: jnp.dtype
    remat: str
    scan: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], label: Int[Array, "B"] | None
    ) -> Float[Array, "B T F"]:
        position_init = nn.initializers.normal(stddev=self.width**-0.5)
        position = self.param("position", position_init, (x.shape[1], self.width), jnp.float32)
        x = nn.Dense(self.width, dtype=self.dtype, name="proj_in")(x)
        x = x + position.astype(x.dtype)
        if self.num_classes:
            x = x + self._class_token(label, x.shape[0]).astype(x.dtype)
        options = {"causal": False} if self.net == "vit" else {}
        x = through_layers(
            self._layer(),
            x,
            num_layers=self.num_layers,
            remat=self.remat,
            scan=self.scan,
            **options,
        )
        dtype = at_least_float32(self.dtype)
        x = layer_norm(NORM_EPSILON, self.dtype, "norm")(x)
        zeros = nn.initializers.zeros_init()
        return nn.Dense(self.out_features, dtype=dtype, kernel_init=zeros, name="proj_out")(x)

    def _layer(self) -> nn.Module:
        kernel_init = nn.initializers.xavier_uniform()
        if self.net == "conv":
            return ConvolutionLayer(
                grid=self.grid,
                norm_epsilon=NORM_EPSILON,
                kernel_init=kernel_init,
                dtype=self.dtype,
                name="layers",
            )
        return TransformerLayer(
            num_heads=self.num_heads,
            width=self.width,
            norm_epsilon=NORM_EPSILON,
            approximate_gelu=True,
            kernel_init=kernel_init,
            bias_init=lambda fan_in: nn.initializers.normal(stddev=1e-6),
            dtype=self.dtype,
            name="layers",
        )

    def _class_token(self, label: Int[Array, "B"] | None, batch: int) -> Float[Array, "B 1 W"]:
        init = nn.initializers.normal(stddev=self.width**-0.5)
        embedding = self.param("class_embedding", init, (self.num_classes, self.width), jnp.float32)
        if label is None:
            return jnp.zeros((batch, 1, self.width), embedding.dtype)
        token = jnp.where(label[:, None] >= 0, embedding[jnp.maximum(label, 0)], 0.0)
        return token[:, None]
