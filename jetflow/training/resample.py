"""Values of the tokens of one grid to those of another, as weights: for images of another size.

Bilinear between the centres of the tokens, with both grids laid over the whole image; beyond the
outermost centres the values stay constant. Fewer tokens are not smoothed first.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jetflow.flows import splits as orders

Grid = tuple[int, int]


def tables(
    array: Float[Array, "*L T W"], weights: Sequence[Float[np.ndarray, "N T"]]
) -> Float[Array, "*L N W"]:
    """Tables of values, each resampled by its weights."""
    *layers, tokens, width = array.shape
    resampled = [
        jnp.matmul(jnp.asarray(weight, array.dtype), table, precision="highest")
        for weight, table in zip(weights, array.reshape(-1, tokens, width), strict=True)
    ]
    return jnp.stack(resampled).reshape(*layers, -1, width)


def in_image_order(there: Grid, here: Grid) -> Float[np.ndarray, "N T"]:
    """Weights that make the values of N tokens here of those of T tokens there, row by row."""
    rows, columns = (_along_axis(old, new) for old, new in zip(there, here, strict=True))
    return np.kron(rows, columns)


def on_spatial_split(pattern: str, there: Grid, here: Grid) -> Float[np.ndarray, "N T"]:
    """The same for the tokens that a coupling's net sees on a spatial split.

    Its tokens 2k and 2k + 1 are the two halves of the k-th chosen token's features, so that each
    half has values of its own at the places of the chosen tokens. These are spread over the whole
    grid, go to the other one, and there those of its chosen tokens are kept.

    Args:
        pattern: of the chosen tokens, as for `orders.token_pattern`.
    """
    old, new = (orders.token_pattern(pattern, grid) for grid in (there, here))
    old, new = old[: len(old) // 2], new[: len(new) // 2]
    chosen = in_image_order(there, here)[new] @ _spread(old, there)
    return np.kron(chosen, np.eye(2))


def _along_axis(there: int, here: int) -> Float[np.ndarray, "N T"]:
    old, new = ((np.arange(size) + 0.5) / size for size in (there, here))
    return np.stack([np.interp(new, old, unit) for unit in np.eye(there)], axis=1)


def _spread(chosen: Int[np.ndarray, "K"], grid: Grid) -> Float[np.ndarray, "T K"]:
    """Weights that make values of all tokens of those of the chosen ones.

    A token between is the mean of its neighbours on opposite sides, or at the border of those that
    there are: together with bilinear interpolation that is linear interpolation for stripes, and
    for a checkerboard exact for what is linear in the place.
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
