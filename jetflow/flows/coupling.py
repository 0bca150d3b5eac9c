"""Jet: affine couplings whose net is a Vision Transformer, or convolves (arXiv 2412.15129)."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.flows import affine
from jetflow.flows import splits as orders
from jetflow.nn.encoder import Encoder
from jetflow.types import BlockInputs, BlockOutputs, Decoding, Guidance, UsageError


def divide(
    x: Float[Array, "B T D"], split: orders.Splits
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """The two halves of x under one layer's split.

    On a spatial split each of the T/2 chosen tokens is folded into two tokens of D/2 features, so
    that the halves have the same shape in both kinds.
    """
    batch, tokens, features = x.shape
    x = jnp.take(jnp.take(x, split.token_order, axis=1), split.feature_order, axis=2)
    by_token = x.reshape(batch, 2, tokens, features // 2)
    by_feature = x.reshape(batch, tokens, 2, features // 2).swapaxes(1, 2)
    halves = jnp.where(split.spatial, by_token, by_feature)
    return halves[:, 0], halves[:, 1]


def merge(
    x1: Float[Array, "B T H"], x2: Float[Array, "B T H"], split: orders.Splits
) -> Float[Array, "B T 2*H"]:
    """The inverse of `divide`."""
    batch, tokens, half = x1.shape
    by_token = jnp.stack([x1, x2], axis=1).reshape(batch, tokens, 2 * half)
    by_feature = jnp.concatenate([x1, x2], axis=-1)
    x = jnp.where(split.spatial, by_token, by_feature)
    x = jnp.take(x, jnp.argsort(split.feature_order), axis=2)
    return jnp.take(x, jnp.argsort(split.token_order), axis=1)


class Coupling(nn.Module):
    """One layer: y2 = (x2 + b)·m·σ(s) with (b, s) = net(x1); y1 = x1."""

    net: Encoder
    scale_factor: float

    def forward(self, x: Float[Array, "B T D"], split: orders.Splits, places, label):
        x1, x2 = divide(x, split)
        bias, gate = self._predict(x1, places, label)
        y2, logdet = affine.squash(x2, bias, gate, self.scale_factor)
        return merge(x1.astype(y2.dtype), y2, split), logdet

    def inverse(self, y: Float[Array, "B T D"], split: orders.Splits, places, label):
        y1, y2 = divide(y, split)
        bias, gate = self._predict(y1, places, label)
        x2, logdet = affine.unsquash(y2, bias, gate, self.scale_factor)
        return merge(y1.astype(x2.dtype), x2, split), logdet

    def _predict(self, x1: Float[Array, "B T H"], places: Int[Array, "T"] | None, label):
        """Bias and gate; a net that convolves gets the tokens as they lie on the grid."""
        if places is None:
            predicted = self.net(x1, label)
        else:
            predicted = self.net(jnp.take(x1, places, axis=1), label)
            predicted = jnp.take(predicted, jnp.argsort(places), axis=1)
        return jnp.split(predicted, 2, axis=-1)


class Couplings(nn.Module):
    """A chain of couplings; the identity at initialisation.

    The splits are the variables of collection `constants`: stored with a model, never trained.

    Attributes:
        grid, features: rows and columns of tokens, and D.
        num_couplings, kinds: layers, and the cycle of their kinds of split.
        scale_factor: m; a layer multiplies half of the dimensions by less than m.
        net, width, block_depth, num_heads, num_classes, dtype, remat: of each layer's `Encoder`.
        scan: let the program loop over the couplings and their layers, instead of holding each.
    """

    grid: tuple[int, int]
    features: int
    num_couplings: int
    kinds: tuple[str, ...]
    scale_factor: float
    net: str
    width: int
    block_depth: int
    num_heads: int
    num_classes: int
    dtype: jnp.dtype
    remat: str
    scan: bool

    def setup(self):
        splits = orders.splits(self.num_couplings, self.kinds, self.grid, self.features)
        self.splits = {
            name: self.variable("constants", name, jnp.asarray, value)
            for name, value in splits._asdict().items()
        }
        convolves = self.net == "conv"
        self.places = (
            orders.places(self.num_couplings, self.kinds, self.grid) if convolves else None
        )
        encoder = Encoder(
            net=self.net,
            grid=self.grid,
            width=self.width,
            num_layers=self.block_depth,
            num_heads=self.num_heads,
            out_features=self.features,
            num_classes=self.num_classes,
            dtype=self.dtype,
            remat=self.remat,
            scan=self.scan,
            parent=None,
        )
        self.layers = Coupling(encoder, self.scale_factor)

    @property
    def logdet_cap(self) -> float:
        """The least upper bound of the log-determinant of one example, in nats."""
        tokens = math.prod(self.grid)
        return self.num_couplings * tokens * self.features / 2 * math.log(self.scale_factor)

    def forward(self, x, label):
        return self.forward_blocks(x, label)[:2]

    def forward_blocks(
        self, x: Float[Array, "B T D"], label: Int[Array, "B"] | None
    ) -> BlockOutputs:
        def body(layer: Coupling, carry, order):
            x, total = carry
            y, logdet = layer.forward(x, *order, label)
            return (y, total + logdet), (logdet, affine.root_mean_square(y))

        (z, logdet), of_each = self._scan(body, x, reverse=False)
        return BlockOutputs(z, logdet, *of_each)

    def inverse(self, z, label, guidance, decoding=None):
        return self.inverse_blocks(z, label, guidance, decoding)[:2]

    def inverse_blocks(
        self,
        z: Float[Array, "B T D"],
        label: Int[Array, "B"] | None,
        guidance: Guidance | None,
        decoding: Decoding | None = None,
    ) -> BlockInputs:
        if guidance is not None or decoding is not None:
            raise UsageError("guidance and decoding need a TarFlow; Jet's couplings have neither")

        def body(layer: Coupling, carry, order):
            y, total = carry
            x, logdet = layer.inverse(y, *order, label)
            return (x, total + logdet), x

        (x, logdet), tokens = self._scan(body, z, reverse=True)
        once, exact = jnp.ones(len(tokens), int), jnp.zeros(len(tokens), x.dtype)
        return BlockInputs(x, logdet, tokens[::-1], once, exact)

    def _scan(self, body, x, *, reverse: bool):
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            reverse=reverse,
            unroll=1 if self.scan else self.num_couplings,
        )
        splits = orders.Splits(**{name: split.value for name, split in self.splits.items()})
        (x,) = affine.widen(x)
        start = x, jnp.zeros(x.shape[0], x.dtype)
        return scanned(self.layers, start, (splits, self.places))
