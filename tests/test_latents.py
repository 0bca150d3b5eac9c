"""Latents of images, paths between them, and the image after each block."""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetflow.sampling import latents
from jetflow.sampling.ancestral import Sampler, quantise
from jetflow.types import Guidance

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
LABEL = jnp.array([0, 1, 2])


@functools.cache
def sampler(kind: str, guidance: Guidance | None = None) -> Sampler:
    small = {"jet": {"num_couplings": 3}, "tarflow": {"num_blocks": 2}}[kind]
    flow = getattr(flow_laws, kind)(num_classes=3, dtype="float32", **small)
    return Sampler(flow, flow_laws.random_variables(flow, jnp.float32), guidance=guidance)


@pytest.mark.parametrize(("kind", "noise"), [("jet", "uniform"), ("tarflow", "gaussian")])
def test_images_come_back(kind, noise):
    z, logdet = latents.encode(sampler(kind), IMAGES, LABEL, noise, batch_size=2)
    assert logdet.shape == (3,)
    pixels = sampler(kind).decode(z, LABEL).pixels
    np.testing.assert_allclose(pixels, IMAGES + latents.centre(noise), rtol=0, atol=5e-3)
    np.testing.assert_array_equal(quantise(pixels, noise), IMAGES)
    other = sampler(kind).decode(z, LABEL[::-1]).pixels
    assert np.abs(other - pixels).max() > 0.1


def test_a_path_keeps_the_norm():
    first, last = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 12)))
    path = latents.interpolate(first, last, 9)
    np.testing.assert_allclose(path[0], first, atol=1e-5)
    np.testing.assert_allclose(path[-1], last, atol=1e-5)
    ends = sorted([float(jnp.linalg.norm(first)), float(jnp.linalg.norm(last))])
    norms = jnp.linalg.norm(path, axis=(1, 2))
    assert norms.min() > 0.98 * ends[0] and norms.max() < 1.02 * ends[1]
    assert jnp.linalg.norm((first + last) / 2) < 0.8 * ends[0]  # as on the straight line
    steps = jnp.linalg.norm(jnp.diff(path, axis=0), axis=(1, 2))
    assert steps.max() < 1.1 * steps.min()
    one = jnp.ones((4, 3))  # a path between equal ends stands still
    np.testing.assert_allclose(latents.interpolate(one, one, 3), jnp.ones((3, 4, 3)), atol=1e-6)
    np.testing.assert_array_equal(latents.interpolate(0 * one, 0 * one, 3), jnp.zeros((3, 4, 3)))


@pytest.mark.parametrize(
    ("kind", "guidance", "stages"),
    [("jet", None, 4), ("tarflow", Guidance(2.0), 3)],
)
def test_a_trace_ends_at_the_sample(kind, guidance, stages):
    there = sampler(kind, guidance)
    z = jnp.asarray(there.latents(jax.random.key(0), np.arange(3)))
    images = latents.trace(there, z, LABEL)
    assert images.shape == (stages, 3, 4, 4, 1)
    np.testing.assert_allclose(images[0], there.flow.pixels.inverse(z)[0], atol=1e-3)
    np.testing.assert_allclose(images[-1], there.decode(z, LABEL).pixels, atol=1e-2)
    assert (np.abs(np.diff(images, axis=0)).max((1, 2, 3, 4)) > 1).all()


def test_the_stages_of_a_jet_are_its_couplings():
    """In the order of sampling: the last coupling is undone first."""
    there = sampler("jet")
    z = jnp.asarray(there.latents(jax.random.key(0), np.arange(3)))
    images = latents.trace(there, z, LABEL)
    last = jax.tree.map(lambda leaf: leaf[2:], there.variables)
    one = flow_laws.jet(num_classes=3, dtype="float32", num_couplings=1)
    expected, _ = one.apply(last, z, LABEL, method="inverse")
    np.testing.assert_allclose(images[1], expected, atol=1e-3)
