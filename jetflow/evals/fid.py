"""The Fréchet distance between the features of two sets of images (arXiv 1706.08500)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jetflow.evals.statistics import Moments


class Gaussian(NamedTuple):
    """The normal distribution that stands for a set of features."""

    mean: Float[np.ndarray, "D"]
    covariance: Float[np.ndarray, "D D"]

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        return cls(moments.mean(), moments.covariance())


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
    noise = np.finfo(np.float64).eps * len(values) * max(values[-1], 0.0)
    real = values > noise
    return vectors[:, real] * np.sqrt(values[real])
