"""Values of the tokens of one grid to those of another, as weights: for images of another size.

Bilinear between the centres of the tokens, with both grids laid over the whole image; beyond the
outermost centres the values stay constant. Fewer tokens are not smoothed first.
"""

import numpy as np
from jaxtyping import Float, Int

from jetflow.flows.coupling import token_pattern

Grid = tuple[int, int]


def between_grids(old: Grid, new: Grid) -> Float[np.ndarray, "N T"]:
    """Weights that make the values of N tokens, row by row, from those of T tokens."""
    rows, columns = (_along_axis(*sizes) for sizes in zip(old, new, strict=True))
    return np.kron(rows, columns)


def between_spatial_splits(pattern: str, old: Grid, new: Grid) -> Float[np.ndarray, "N T"]:
    """The same for the tokens that a coupling's net sees on a spatial split.

    Its tokens 2k and 2k + 1 are the two halves of the k-th chosen token's features, so that each
    half has a value for each chosen token. These are spread over the old grid, interpolated on the
    new one, and kept for the tokens that are chosen there.

    Args:
        pattern: of the chosen tokens, as for `token_pattern`.
    """
    before, after = (np.split(token_pattern(pattern, grid), 2)[0] for grid in (old, new))
    return np.kron(between_grids(old, new)[after] @ _spread(before, old), np.eye(2))


def _along_axis(old: int, new: int) -> Float[np.ndarray, "N T"]:
    before, after = ((np.arange(size) + 0.5) / size for size in (old, new))
    return np.stack([np.interp(after, before, unit) for unit in np.eye(old)], axis=1)


def _spread(chosen: Int[np.ndarray, "K"], grid: Grid) -> Float[np.ndarray, "T K"]:
    """Weights that make values of all tokens from those of the chosen ones.

    A token between is the mean of its neighbours on opposite sides, or at the border of those that
    exist: together with bilinear interpolation that is linear interpolation for stripes, and for a
    checkerboard exact for what is linear in the place.
    """
    rank = np.full((grid[0] + 2, grid[1] + 2), -1)  # of a chosen token, within a border of none
    rank[1:-1, 1:-1].flat[chosen] = np.arange(len(chosen))
    weights = np.zeros((*grid, len(chosen)))
    for row, column in np.ndindex(grid):
        around = rank[row : row + 3, column : column + 3]
        pairs = [(around[1, 0], around[1, 2]), (around[0, 1], around[2, 1])]
        whole = [pair for pair in pairs if min(pair) >= 0]
        sources = [around[1, 1]] if around[1, 1] >= 0 else np.concatenate(whole or pairs)
        sources = [source for source in sources if source >= 0]
        weights[row, column, sources] = 1 / len(sources)
    return weights.reshape(-1, len(chosen))
