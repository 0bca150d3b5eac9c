"""How samples and real images cover each other, by nearest neighbours among their features.

Precision and recall: arXiv 1904.06991. Density and coverage: arXiv 2002.09797. Distances are
computed in float64, a block of rows at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jetflow.types import UsageError

BLOCK = 1024  # rows of a block of distances


class PrecisionRecall(NamedTuple):
    """Shares of the samples that lie among the real images, and the other way round."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real neighbourhoods that a sample lies in, over k; share of those that have a sample."""

    density: float
    coverage: float


def precision_recall(
    real: Float[np.ndarray, "N D"], samples: Float[np.ndarray, "M D"], k: int = 3
) -> PrecisionRecall:
    """A point lies among others if it is no farther from one of them than its k-th neighbour."""
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    real_radii, sample_radii = radii(real, k), radii(samples, k)
    precise = _are_among(samples, real, real_radii)
    recalled = _are_among(real, samples, sample_radii)
    return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def _are_among(points, others, radii) -> np.ndarray:
    return np.concatenate([(block <= radii).any(1) for block in _blocks(points, others)])


def density_coverage(
    real: Float[np.ndarray, "N D"], samples: Float[np.ndarray, "M D"], k: int = 5
) -> DensityCoverage:
    """Both by balls around the real images, as large as the distance of the k-th neighbour."""
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    real_radii = radii(real, k)
    inside, covered = 0, np.zeros(len(real), bool)
    for distances in _blocks(samples, real):
        within = distances <= real_radii
        inside += within.sum()
        covered |= within.any(0)
    return DensityCoverage(float(inside / (k * len(samples))), float(covered.mean()))


def radii(points: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, "N"]:
    """The squared distance of each point from the k-th nearest other one.

    Raises:
        UsageError: if there are not so many others.
    """
    check_count(len(points), k)
    # The nearest is the point itself.
    return np.concatenate(
        [np.partition(distances, k, axis=1)[:, k] for distances in _blocks(points, points)]
    )


def check_count(count: int, k: int) -> None:
    """Raise a UsageError if so many points do not have k neighbours each."""
    if count <= k:
        raise UsageError(
            f"there are {count} features, too few for {k} neighbours of each; raise "
            "--num_samples or --num_features, or give a reference with more of them"
        )


def _blocks(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]
) -> Iterator[Float[np.ndarray, "_ M"]]:
    """Squared distances from the rows of a to all of b, some rows at a time."""
    squares = (b**2).sum(1)
    for first in range(0, len(a), BLOCK):
        rows = a[first : first + BLOCK]
        yield np.maximum((rows**2).sum(1)[:, None] + squares - 2 * rows @ b.T, 0)
