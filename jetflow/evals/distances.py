"""Distances between the features of two sets of images, on the host and in float64.

Fréchet distance: arXiv 1706.08500. Kernel distance: arXiv 1801.01401. Precision and recall: arXiv
1904.06991. Density and coverage: arXiv 2002.09797.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import pairwise_distances_chunked

from jetflow.types import UsageError

Features = Float[np.ndarray, "_ _"]

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance
PARTS = 10  # disjoint ones, at least, from which the error of the kernel distance is estimated


class Gaussian(NamedTuple):
    """The normal distribution that stands for a set of features."""

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½), with a and b in float64.

    The eigenvalues of Σ_a·Σ_b are the squared singular values of R_aᵀ·R_b, where Σ = R·Rᵀ: so the
    trace of its root is their sum, also where fewer images than features make Σ singular.
    """
    product = _root(a.covariance).T @ _root(b.covariance)
    trace = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + spread - 2 * trace)


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D R"]:
    """R of Σ = R·Rᵀ; directions in which there is nothing but rounding are left out."""
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    rounding = np.finfo(np.float64).eps * len(values) * max(values[-1], 0.0)
    real = values > rounding
    return vectors[:, real] * np.sqrt(values[real])


def kernel_distance(
    a: Features, b: Features, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float, dict[str, int]]:
    """The mean over random subsets, drawn without replacement, of the squared kernel distance.

    With no more than `size` features in both sets, these are compared once.

    Returns:
        The mean; its standard error, over other images and other subsets, nan for less than 20
        images; the number of subsets, and of images of each set in each.
    """
    rng = np.random.default_rng(seed)
    subsets = 1 if max(len(a), len(b)) <= size else subsets
    size = min(size, len(a), len(b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    values = [
        squared_mmd(*(one[rng.choice(len(one), size, replace=False)] for one in (a, b)))
        for _ in range(subsets)
    ]
    of_choice = np.var(values, ddof=1) / subsets if subsets > 1 else 0.0
    error = np.sqrt(_kernel_variance(a, b, size, rng) + of_choice)
    return float(np.mean(values)), float(error), {"subsets": subsets, "subset_size": size}


def _kernel_variance(a: Features, b: Features, size: int, rng: np.random.Generator) -> float:
    """The variance of the distance between sets like these, over the choice of their images.

    Overlapping subsets share their images and cannot show it: it takes disjoint parts. For an
    unbiased estimate U of n images, n·Var(U) never grows with n (Hoeffding 1948, Theorem 5.2), so
    the variance of the parts' mean is the right one where the sets differ, and too large, by no
    more than the number of parts, where they do not.
    """
    part = min(size, min(len(a), len(b)) // PARTS)
    if part < 2:
        return float("nan")
    parts = min(len(a), len(b)) // part
    orders = [rng.permutation(len(one))[: parts * part].reshape(parts, part) for one in (a, b)]
    values = [squared_mmd(a[rows], b[columns]) for rows, columns in zip(*orders, strict=True)]
    return float(np.var(values, ddof=1) / parts)


def squared_mmd(x: Features, y: Features) -> float:
    """Unbiased squared maximum mean discrepancy, of the kernel (xᵀy / D + 1)³."""
    size = len(x)
    within = [kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: Features, samples: Features, k: int = 3) -> dict[str, float]:
    """Shares of the samples that lie among the real images, and the other way round.

    A point lies among others if it is no farther from one of them than its k-th neighbour.
    """
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    precise, _ = _inside(samples, real, radii(real, k))
    recalled, _ = _inside(real, samples, radii(samples, k))
    return {"precision": float((precise > 0).mean()), "recall": float((recalled > 0).mean())}


def density_coverage(real: Features, samples: Features, k: int = 5) -> dict[str, float]:
    """Real neighbourhoods that a sample lies in, over k; share of those that have a sample.

    A neighbourhood is a ball around a real image that reaches to its k-th real neighbour.
    """
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    count, covered = _inside(samples, real, radii(real, k))
    return {"density": float(count.sum() / (k * len(samples))), "coverage": float(covered.mean())}


def _inside(
    points: Features, centres: Features, radius: Float[np.ndarray, "N"]
) -> tuple[np.ndarray, Bool[np.ndarray, "N"]]:
    """How many balls each point lies in, and which balls have a point in them."""
    counts, covered = [], np.zeros(len(centres), bool)
    for distances in pairwise_distances_chunked(points, centres):
        within = distances <= radius
        counts.append(within.sum(1))
        covered |= within.any(0)
    return np.concatenate(counts), covered


def radii(points: Features, k: int) -> Float[np.ndarray, "N"]:
    """The distance of each point from the k-th nearest other one.

    Raises:
        UsageError: if there are not so many others.
    """
    check_count(len(points), k)
    # The nearest is the point itself.
    nearest = [np.partition(rows, k, axis=1)[:, k] for rows in pairwise_distances_chunked(points)]
    return np.concatenate(nearest)


def check_count(count: int, k: int) -> None:
    """Raise a UsageError if so many points do not have k neighbours each."""
    if count <= k:
        raise UsageError(
            f"there are {count} features, too few for {k} neighbours of each; raise num_samples or "
            "num_features, or give a reference with more of them"
        )
