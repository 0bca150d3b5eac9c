"""The kernel Inception distance: an unbiased estimate, with its error (arXiv 1801.01401)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SUBSETS, SUBSET_SIZE = 100, 1000


class Kid(NamedTuple):
    """A KID.

    Attributes:
        mean: over the subsets.
        standard_error: of the mean, over the subsets; nan for a single one.
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
    error = float(np.std(values, ddof=1) / np.sqrt(subsets)) if subsets > 1 else float("nan")
    return Kid(float(np.mean(values)), error, subsets, size)


def squared_mmd(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N D"]) -> float:
    """Unbiased squared maximum mean discrepancy, of the kernel (xᵀy / D + 1)³."""
    size = len(x)
    within = [kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3
