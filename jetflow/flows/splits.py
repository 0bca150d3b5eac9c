"""Which half of an image a coupling layer sees: permutations of features, patterns of tokens.

Plain numpy, no parameters. A split is two orders, of the tokens and of the features, of which one
is the identity; the first half of what they order is x1, the second x2.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jetflow.types import AnyArray, UsageError

KINDS = ("channels", "spatial")
SPATIAL_CYCLE = (
    "checkerboard",
    "checkerboard-inv",
    "vstripes",
    "vstripes-inv",
    "hstripes",
    "hstripes-inv",
)


class Splits(NamedTuple):
    """The splits of L coupling layers, or without the axis L that of one."""

    token_order: Int[AnyArray, "*L T"]
    feature_order: Int[AnyArray, "*L D"]
    spatial: Bool[AnyArray, "*L"]


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


def splits(
    num_couplings: int, kinds: tuple[str, ...], grid: tuple[int, int], features: int
) -> Splits:
    """The splits of `num_couplings` layers, cycling through `kinds`.

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
    tokens = grid[0] * grid[1]
    permutations = _permutations(features)
    token_order = [token_pattern(p, grid) if p else np.arange(tokens) for p in patterns]
    feature_order = [np.arange(features) if p else next(permutations) for p in patterns]
    spatial = np.array([p is not None for p in patterns])
    return Splits(np.array(token_order, np.int32), np.array(feature_order, np.int32), spatial)


def places(
    num_couplings: int, kinds: tuple[str, ...], grid: tuple[int, int]
) -> Int[np.ndarray, "L T"]:
    """Of each layer, the order that lays the tokens of a half on the grid, row by row.

    On a channel split they lie there already. On a spatial one each chosen token is two, which stay
    where it was and where a token is left out: beside it, or on hstripes, which leave out whole
    rows, below it.
    """
    in_rows = np.arange(grid[0] * grid[1])
    found = []
    for pattern in layer_patterns(num_couplings, kinds):
        if pattern and pattern.startswith("hstripes"):
            found.append(in_rows.reshape(-1, grid[1], 2).swapaxes(1, 2).reshape(-1))
        else:
            found.append(in_rows)
    return np.array(found, np.int32)


def _permutations(features: int) -> Iterator[Int[np.ndarray, "D"]]:
    """Random orders of the features, each followed by itself with its halves swapped."""
    for seed in itertools.count():
        permutation = np.random.default_rng(seed).permutation(features)
        yield permutation
        yield np.roll(permutation, features // 2)
