"""Distances between sets of features: against direct computations, and the published figure."""

import inception_rule
import numpy as np
import pytest
import sklearn

from jetflow.evals import distances
from jetflow.evals.distances import Gaussian, frechet_distance
from jetflow.types import UsageError


def features(count, size, *, seed, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, size)) + shift


def gaussian(rows):
    return Gaussian(rows.mean(0), np.cov(rows.T))


def test_the_published_distance():
    golden = inception_rule.golden()
    found = frechet_distance(gaussian(golden["frechet_a"]), gaussian(golden["frechet_b"]))
    assert found == pytest.approx(float(golden["frechet_distance"]), rel=1e-9)


def test_distance_in_closed_form():
    """Of covariances that commute: the sum of squared differences of standard deviations."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    deviations, means = rng.uniform(0, 2, (2, 5)), rng.standard_normal((2, 5))
    deviations[0, :2] = deviations[1, 1:3] = 0  # singular, in different directions
    a, b = (
        Gaussian(mean, rotation @ np.diag(d**2) @ rotation.T)
        for mean, d in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-12


def test_distance_of_fewer_images_than_features():
    rows = features(20, 300, seed=1)
    assert abs(frechet_distance(gaussian(rows), gaussian(rows))) < 1e-9
    moved = frechet_distance(gaussian(rows), gaussian(rows + 0.1))
    assert moved == pytest.approx(300 * 0.01, rel=1e-9)


# By neighbours, one pair of points after another.


def distance(a, b):
    return np.sqrt(((a - b) ** 2).sum())


def kth(points, i, k):
    return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]


def are_among(points, others, k):
    return np.mean([
        any(distance(p, other) <= kth(others, j, k) for j, other in enumerate(others))
        for p in points
    ])  # fmt: skip


@pytest.fixture
def sets():
    """Real and made features, of different number, in blocks that do not divide them."""
    with sklearn.config_context(working_memory=0.0005):
        yield features(25, 3, seed=2), features(18, 3, seed=3, shift=0.7)


def test_precision_recall(sets):
    real, made = sets
    expected = {"precision": are_among(made, real, 3), "recall": are_among(real, made, 3)}
    assert distances.precision_recall(real, made, 3) == pytest.approx(expected)
    assert 0.2 < min(expected.values()) < max(expected.values()) < 1
    assert distances.precision_recall(real, real) == {"precision": 1, "recall": 1}


def test_density_coverage(sets):
    real, made = sets
    inside = [
        [distance(point, other) <= kth(real, j, 5) for j, other in enumerate(real)]
        for point in made
    ]
    density, coverage = np.sum(inside) / (5 * len(made)), np.any(inside, axis=0).mean()
    expected = {"density": density, "coverage": coverage}
    assert distances.density_coverage(real, made, 5) == pytest.approx(expected)
    assert density not in (0, 1) and 0.2 < coverage < 1
    assert distances.density_coverage(real, real)["coverage"] == 1


def test_too_few_neighbours():
    with pytest.raises(UsageError, match="there are 3 features, too few for 3 neighbours"):
        distances.precision_recall(features(9, 2, seed=0), features(3, 2, seed=1))


# The kernel distance.


def direct_mmd(x, y):
    """Sum over pairs, as in arXiv 1801.01401, Eq. 4."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    within = [
        np.mean([kernel(z[i], z[j]) for i in range(n) for j in range(n) if i != j]) for z in (x, y)
    ]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance():
    x, y = features(12, 5, seed=5), features(12, 5, seed=6, shift=0.3)
    mean, error, facts = distances.kernel_distance(x, y)
    assert mean == pytest.approx(direct_mmd(x, y))
    assert facts == {"subsets": 1, "subset_size": 12} and np.isnan(error)


def test_kernel_distance_over_subsets():
    """Unbiased, so that it may be below zero."""
    x, y = features(400, 5, seed=7), features(300, 5, seed=8)
    few, many = (distances.kernel_distance(x, y, size=50, subsets=n) for n in (5, 320))
    assert abs(many[0]) < 5 * many[1] < 0.5
    assert few[1] > many[1]
    assert many == distances.kernel_distance(x, y, size=50, subsets=320)
    assert many != distances.kernel_distance(x, y, size=50, subsets=320, seed=1)
    mean, error, _ = distances.kernel_distance(x, y + 1, size=50)
    assert mean > 10 * error > 0


@pytest.mark.parametrize("size", [20, 400])  # many overlapping subsets, and all at once
@pytest.mark.parametrize(("shift", "largest"), [(0.5, 1.3), (0.0, 4.0)])
def test_error_of_the_kernel_distance_is_that_over_fresh_images(size, shift, largest):
    found = [
        distances.kernel_distance(
            features(200, 4, seed=2 * trial),
            features(200, 4, seed=2 * trial + 1, shift=shift),
            size=size,
            subsets=15,
        )
        for trial in range(150)
    ]
    spread = np.std([mean for mean, _, _ in found], ddof=1)
    claimed = np.sqrt(np.mean([error**2 for _, error, _ in found]))
    assert 0.8 < claimed / spread < largest
