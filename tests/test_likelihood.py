"""Nats and bits: the density is one over pixel values, and bits per dimension are of it."""

import functools
import math

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

import jetflow
from jetflow import likelihood
from jetflow.flows.stack import check_labels
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(0)
Z = RNG.standard_normal((3, 4, 2))
LOGDET = np.array([1.0, -2.0, 30.0])
VARIANCE = RNG.uniform(0.5, 2, (4, 2))


def prior_nll(variance):
    variance = variance if isinstance(variance, float) else jnp.asarray(variance)
    return likelihood.prior_nll(jnp.asarray(Z), variance)


@pytest.mark.parametrize("variance", [1.0, VARIANCE], ids=["standard", "learned"])
def test_prior_is_a_normal_distribution(variance):
    expected = -norm.logpdf(Z, scale=jnp.sqrt(variance)).sum((1, 2))
    np.testing.assert_allclose(prior_nll(variance), expected, rtol=1e-12)


def test_nll_is_by_the_change_of_variables():
    nll = likelihood.nll(*map(jnp.asarray, (Z, LOGDET, VARIANCE)))
    np.testing.assert_allclose(nll, prior_nll(VARIANCE) - LOGDET, rtol=1e-12)


def test_bits_per_dim_by_hand():
    """ln 4 nats an example of 8 dimensions are 2 bits, a quarter of a bit for each."""
    bits = likelihood.bits_per_dim(jnp.full(3, math.log(4)), jnp.asarray(Z))
    np.testing.assert_allclose(bits, [0.25] * 3, rtol=1e-12)


def test_importance_weighting_averages_densities():
    """Not their logarithms; in one draw, and in draws that agree, there is no difference."""
    bits, size = RNG.uniform(3, 4, (5, 3)), 12
    densities = 2.0 ** (-bits * size)
    found = likelihood.importance_weighted(bits, size)
    np.testing.assert_allclose(found, -np.log2(densities.mean(0)) / size, rtol=1e-12)
    assert (found < bits.mean(0) - 1e-3).all()
    np.testing.assert_allclose(likelihood.importance_weighted(bits[:1], size), bits[0], rtol=1e-12)
    tiny = likelihood.importance_weighted(np.array([[8.0], [8.1]]), 10**6)  # 2^-8,000,000
    np.testing.assert_allclose(tiny, 8 + 1e-6, rtol=1e-12)


def test_bits_per_dim_under_jit():
    """Of a traced label shape and type are checked, and its values are used."""
    flow = flow_laws.tarflow(num_classes=3, num_blocks=1)
    variables, key = flow_laws.random_variables(flow), jax.random.key(0)
    images = jnp.asarray(RNG.integers(0, 256, (3, 4, 4, 1)), jnp.uint8)
    bits = functools.partial(jetflow.bits_per_dim, flow, variables, images, key=key)
    label = jnp.array([0, 2, -1])
    np.testing.assert_allclose(jax.jit(bits)(label), bits(label), rtol=1e-12)
    for wrong in (label[:2], label.astype(float)):
        with pytest.raises(UsageError, match="expected one integer, or 3"):
            jax.eval_shape(lambda label: check_labels(flow, label, 3), wrong)


# A density over the pixel values of two-pixel images, integrated over the plane.

TWO_PIXELS = {
    "jet": lambda: flow_laws.jet((1, 1, 2), patch_size=1, kinds=("channels",)),
    "tarflow": lambda: flow_laws.tarflow((1, 2, 1), patch_size=1),
    "volume preserving": lambda: flow_laws.tarflow(
        (1, 2, 1), patch_size=1, volume_preserving=True, pixel_scale=127.5
    ),
}


@pytest.mark.parametrize("kind", TWO_PIXELS)
def test_density_integrates_to_one(kind):
    flow = TWO_PIXELS[kind]()
    variables = flow_laws.random_variables(flow)
    if flow.learned_prior:
        variables = variables | {"prior": {"variance": jnp.array([[0.5], [3.0]])}}
    side = np.linspace(-1000, 1000, 251)
    x = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, *flow.image_shape)

    @jax.jit
    def density(x):
        z, logdet = flow.apply(variables, x, method="forward")
        return jnp.exp(-likelihood.nll(z, logdet, likelihood.prior_variance(variables)))

    cell = (side[1] - side[0]) ** 2
    np.testing.assert_allclose(density(x).sum() * cell, 1, rtol=1e-3)
