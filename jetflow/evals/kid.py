"""The kernel Inception distance: an unbiased estimate, with its error (arXiv 1801.01401)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SUBSETS, SUBSET_SIZE = 100, 1000
PARTS = 10  # at least, of which the error is estimated


class Kid(NamedTuple):
    """A KID.

    Attributes:
        mean: over the subsets.
        standard_error: of the mean, over other images and other subsets; nan of less than 20.
        subsets, size: how many there are, and the images of each in each.
    """

    mean: float
    standard_error: float
    subsets: int
    size: int


def kernel_distance(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> Kid:
    """The mean over random subsets, drawn without replacement, of the squared kernel distance.

    With no more than `size` features in both sets, these are compared once.
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
    error = np.sqrt(_variance(a, b, size, rng) + of_choice)
    return Kid(float(np.mean(values)), float(error), subsets, size)


def _variance(a, b, size: int, rng: np.random.Generator) -> float:
    """Of the distance between sets like these, over the images that happen to be in them.

    Overlapping subsets are all of the same images, and cannot tell: it takes disjoint parts. For an
    unbiased estimate U of n images, n·Var(U) never grows with n (Hoeffding 1948, Theorem 5.2), so
    the variance of the parts' mean is the right one where the sets differ, and too large, by no
    more than the number of parts, where they do not.
    """
    part = min(size, min(len(a), len(b)) // PARTS)
    if part < 2:
        return float("nan")
    parts = min(len(a), len(b)) // part
    orders = [rng.permutation(len(one))[: parts * part].reshape(parts, part) for one in (a, b)]
    values = [squared_mmd(a[mine], b[its]) for mine, its in zip(*orders, strict=True)]
    return float(np.var(values, ddof=1) / parts)


def squared_mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N D"]) -> float:
    """Unbiased squared maximum mean discrepancy, of the kernel (xᵀy / D + 1)³."""
    size = len(x)
    within = [kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3
