"""Jet: affine couplings whose net is a Vision Transformer, or convolves (arXiv 2412.15129).

A split is two orders, of the tokens and of the features, of which one is the identity; the first
half of what they order is x1, the second x2.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jetflow.flows import affine
from jetflow.nn.encoder import Encoder
from jetflow.types import (
    AnyArray,
    BlockInputs,
    BlockOutputs,
    Condition,
    Decoding,
    Guidance,
    UsageError,
)

KINDS = ("channels", "spatial")
SPATIAL_CYCLE = tuple(
    name + half for name in ("checkerboard", "vstripes", "hstripes") for half in ("", "-inv")
)


class Splits(NamedTuple):
    """The splits of L coupling layers, or without the axis L that of one."""

    token_order: Int[AnyArray, "*L T"]
    feature_order: Int[AnyArray, "*L D"]
    spatial: Bool[AnyArray, "*L"]


def splits(
    num_couplings: int, kinds: tuple[str, ...], grid: tuple[int, int], features: int
) -> Splits:
    """The splits of `num_couplings` layers, cycling through `kinds`; plain numpy, no parameters.

    Channel splits use random permutations of the features, the same in every model; every second
    one is the one before with its halves swapped, so that all features are transformed equally
    often (a layer scales by a bounded factor, and few layers use most of that bound). Spatial
    splits cycle through `SPATIAL_CYCLE`, which swaps its halves likewise.
    """
    patterns = layer_patterns(num_couplings, kinds)
    if features % 2:
        raise UsageError(
            f"a coupling needs an even number of features per patch, but there are {features};"
            " set config.flow.patch_size to an even number"
        )
    permutations = _permutations(features)
    token_order = [token_pattern(p, grid) if p else np.arange(math.prod(grid)) for p in patterns]
    feature_order = [np.arange(features) if p else next(permutations) for p in patterns]
    spatial = np.array([p is not None for p in patterns])
    return Splits(np.array(token_order, np.int32), np.array(feature_order, np.int32), spatial)


def layer_patterns(num_couplings: int, kinds: tuple[str, ...]) -> list[str | None]:
    """The token pattern of each layer's split; None for a channel split."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"config.flow.kinds is {tuple(kinds)}; expected a sequence out of {KINDS}")
    patterns = itertools.cycle(SPATIAL_CYCLE)
    return [
        next(patterns) if kind == "spatial" else None
        for kind in itertools.islice(itertools.cycle(kinds), num_couplings)
    ]


def token_pattern(name: str, grid: tuple[int, int]) -> Int[np.ndarray, "T"]:
    """The order of the tokens that puts the chosen half first, row by row within each half.

    The first tokens are those on even diagonals (checkerboard), columns (vstripes) or rows
    (hstripes); a name that ends in "-inv" swaps the halves.
    """
    row, column = np.indices(grid)
    patterns = {"checkerboard": row + column, "vstripes": column, "hstripes": row}
    parity = patterns[name.removesuffix("-inv")].reshape(-1) % 2
    if parity.mean() != 0.5:
        raise UsageError(
            f"a spatial split ({name}) needs two halves of equal size, but the image has "
            f"{grid[0]}x{grid[1]} patches; set config.flow.patch_size so that both numbers are "
            "even, or config.flow.kinds to ('channels',)"
        )
    return np.argsort(1 - parity if name.endswith("-inv") else parity, kind="stable")


def _permutations(features: int) -> Iterator[Int[np.ndarray, "D"]]:
    """Random orders of the features, each followed by itself with its halves swapped."""
    for seed in itertools.count():
        permutation = np.random.default_rng(seed).permutation(features)
        yield permutation
        yield np.roll(permutation, features // 2)


def places(
    num_couplings: int, kinds: tuple[str, ...], grid: tuple[int, int]
) -> Int[np.ndarray, "L T"]:
    """Of each layer, the order that lays the tokens of a half on the grid, row by row.

    On a channel split they lie there already. On a spatial one each chosen token is two, which stay
    where it was and where a token is left out: beside it, or on hstripes, which leave out whole
    rows, below it.
    """
    in_rows = np.arange(math.prod(grid), dtype=np.int32)
    below = in_rows.reshape(-1, grid[1], 2).swapaxes(1, 2).reshape(-1) if grid[0] % 2 == 0 else None
    patterns = layer_patterns(num_couplings, kinds)
    return np.array([below if p and p.startswith("hstripes") else in_rows for p in patterns])


def divide(
    x: Float[Array, "B T D"], split: Splits
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
    x1: Float[Array, "B T H"], x2: Float[Array, "B T H"], split: Splits
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

    def forward(self, x: Float[Array, "B T D"], split: Splits, places, condition):
        x1, x2 = divide(x, split)
        bias, gate = self._predict(x1, places, condition)
        y2, logdet = affine.squash(x2, bias, gate, self.scale_factor)
        return merge(x1.astype(y2.dtype), y2, split), logdet

    def inverse(self, y: Float[Array, "B T D"], split: Splits, places, condition):
        y1, y2 = divide(y, split)
        bias, gate = self._predict(y1, places, condition)
        x2, logdet = affine.unsquash(y2, bias, gate, self.scale_factor)
        return merge(y1.astype(x2.dtype), x2, split), logdet

    def _predict(self, x1: Float[Array, "B T H"], places: Int[Array, "T"] | None, condition):
        """Bias and gate; a net that convolves gets the tokens as they lie on the grid."""
        if places is None:
            predicted = self.net(x1, condition)
        else:
            predicted = self.net(jnp.take(x1, places, axis=1), condition)
            predicted = jnp.take(predicted, jnp.argsort(places), axis=1)
        return jnp.split(predicted, 2, axis=-1)


class Couplings(nn.Module):
    """A chain of couplings; the identity at initialisation.

    The splits are the variables of collection `constants`: stored with a model, never trained.

    Attributes:
        layers: what each coupling is like; their parameters are stacked on a first axis.
        grid, features: rows and columns of tokens, and D.
        num_couplings, kinds: layers, and the cycle of their kinds of split.
    """

    layers: Coupling
    grid: tuple[int, int]
    features: int
    num_couplings: int
    kinds: tuple[str, ...]

    def setup(self):
        constants = splits(self.num_couplings, self.kinds, self.grid, self.features)
        self.splits = {
            name: self.variable("constants", name, jnp.asarray, value)
            for name, value in constants._asdict().items()
        }

    @property
    def net(self) -> Encoder:
        return self.layers.net

    @property
    def logdet_cap(self) -> float:
        """The least upper bound of the log-determinant of one example, in nats."""
        halves = self.num_couplings * math.prod(self.grid) * self.features / 2
        return halves * math.log(self.layers.scale_factor)

    def forward_blocks(self, x: Float[Array, "B T D"], condition: Condition) -> BlockOutputs:
        def body(layer: Coupling, carry, order):
            x, total = carry
            split, places = order
            y, logdet = layer.forward(x, split, places, condition)
            return (y, total + logdet), (logdet, affine.root_mean_square(y))

        (z, logdet), statistics = self._scan(body, x, reverse=False)
        return BlockOutputs(z, logdet, *statistics)

    def inverse_blocks(
        self,
        z: Float[Array, "B T D"],
        condition: Condition,
        guidance: Guidance | None,
        decoding: Decoding | None = None,
    ) -> BlockInputs:
        if guidance is not None or decoding is not None:
            raise UsageError("guidance and decoding need a TarFlow; Jet's couplings have neither")

        def body(layer: Coupling, carry, order):
            y, total = carry
            split, places = order
            x, logdet = layer.inverse(y, split, places, condition)
            return (x, total + logdet), x

        (x, logdet), tokens = self._scan(body, z, reverse=True)
        once, exact = jnp.ones(len(tokens), int), jnp.zeros(len(tokens), x.dtype)
        return BlockInputs(x, logdet, tokens[::-1], once, exact)

    def _scan(self, body, x, *, reverse: bool):
        net = self.layers.net
        recomputed: Any = nn.remat(body, prevent_cse=not net.scan)
        scanned = nn.scan(
            recomputed if net.remat == "block" else body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            reverse=reverse,
            unroll=1 if net.scan else self.num_couplings,
        )
        orders = Splits(**{name: split.value for name, split in self.splits.items()})
        on_grid = None
        if net.net == "conv":
            on_grid = places(self.num_couplings, self.kinds, self.grid)
        (x,) = affine.widen(x)
        start = x, jnp.zeros(x.shape[0], x.dtype)
        return scanned(self.layers, start, (orders, on_grid))
