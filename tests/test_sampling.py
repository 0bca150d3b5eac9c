"""The sampler: what an image depends on, denoising, rounding, latents, and what is refused."""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jetflow
from jetflow import likelihood
from jetflow.noise import keys_by_example
from jetflow.sampling import latents
from jetflow.sampling.ancestral import Sampler, draw_all, quantise
from jetflow.sampling.denoise import Denoising, denoised
from jetflow.types import Condition, Decoding, Guidance, UsageError

KEY = jax.random.key(7)
LABEL = jnp.array([0, 1, 2])


@functools.cache
def setting(kind: str = "tarflow", num_classes: int = 3, **fields):
    small = {"jet": {"num_couplings": 3}, "tarflow": {"num_blocks": 1}}[kind]
    flow = getattr(flow_laws, kind)(num_classes=num_classes, dtype="float32", **small | fields)
    return flow, flow_laws.random_variables(flow, jnp.float32)


def sample_pixels(flow, variables, key, *, num, label=None, batch_size=64, **settings):
    """`jetflow.sample` before rounding."""
    sampler = Sampler(flow, variables, **settings)
    batches = draw_all(sampler, key, num=num, label=label, batch_size=batch_size)
    return np.concatenate([drawn.pixels for drawn in batches])


# What image i depends on.


@pytest.mark.parametrize("kind", ["jet", pytest.param("tarflow", marks=pytest.mark.slow)])
def test_an_image_depends_on_its_number_alone(kind):
    flow, variables = setting(kind)
    label = np.array([0, 1, 2, -1, 1])
    whole = jetflow.sample(flow, variables, KEY, num=5, label=label)
    assert whole.shape == (5, 4, 4, 1) and whole.dtype == np.uint8
    assert len(np.unique(whole, axis=0)) == 5
    in_parts = jetflow.sample(flow, variables, KEY, num=5, label=label, batch_size=2)
    np.testing.assert_array_equal(in_parts, whole)
    fewer = jetflow.sample(flow, variables, KEY, num=3, label=label[:3], batch_size=2)
    np.testing.assert_array_equal(fewer, whole[:3])


@pytest.mark.parametrize("has_learned_prior", [False, True])
def test_a_sample_is_the_inverse_of_prior_noise(has_learned_prior):
    flow, variables = setting(volume_preserving=has_learned_prior)
    variance = np.random.default_rng(0).uniform(0.2, 3, flow.latent_shape).astype(np.float32)
    if has_learned_prior:
        variables = variables | {"prior": {"variance": jnp.asarray(variance)}}
    keys = keys_by_example(KEY, jnp.arange(3))
    z = jax.vmap(lambda key: jax.random.normal(key, flow.latent_shape))(keys)
    z = 0.5 * z * (np.sqrt(variance) if has_learned_prior else 1)
    expected, _ = jax.jit(functools.partial(flow.apply, method="inverse"))(variables, z, LABEL)
    pixels = sample_pixels(flow, variables, KEY, num=3, label=np.arange(3), temperature=0.5)
    np.testing.assert_allclose(pixels, expected, rtol=1e-4, atol=1e-2)


def test_labels_and_guidance_at_rest():
    """One label for all is a label for each, −1 is none, guidance 0 is none."""
    flow, variables = setting()
    pixels = functools.partial(sample_pixels, flow, variables, KEY, num=3)
    np.testing.assert_array_equal(pixels(label=1), pixels(label=np.array([1, 1, 1])))
    np.testing.assert_allclose(pixels(label=-1), pixels(), atol=1e-3)
    np.testing.assert_array_equal(pixels(label=1, guidance=Guidance(0.0)), pixels(label=1))
    guided = pixels(label=1, guidance=Guidance(2.0))
    assert np.abs(guided - pixels(label=1)).max() > 0.1
    assert (pixels(guidance=Guidance(1.0, temperature=0.5)) != pixels()).any()


def test_images_that_are_not_finite_are_warned_of():
    with pytest.warns(RuntimeWarning, match="3 of 3 images are not finite"):
        jetflow.sample(*setting(), KEY, num=3, temperature=1e38)


# Denoising and rounding.


def test_denoising_follows_the_score():
    """Against central differences of log p, at two σ."""
    with jax.enable_x64(True):
        flow = flow_laws.tarflow(num_classes=3, num_blocks=1)
        variables = flow_laws.random_variables(flow)
        x, label = flow_laws.random_images(flow, 1), jnp.array([2])

        @jax.jit
        def log_prob(x):
            label = jnp.full(len(x), 2)
            return -likelihood.nll(*flow.apply(variables, x, label, method="forward"))

        steps = 1e-3 * np.eye(x.size).reshape(-1, *flow.image_shape)
        score = (log_prob(x + steps) - log_prob(x - steps)) / 2e-3
        assert jnp.abs(score).max() > 1e-3
        step = jax.jit(functools.partial(denoised, flow))
        for std in (0.05, 0.3):
            moved = step(variables, x, Condition(label), std) - x
            expected = (std * 128) ** 2 * score.reshape(x.shape)
            np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-9)


def test_samples_are_denoised():
    flow, variables = setting()
    noisy = sample_pixels(flow, variables, KEY, num=3)
    clean = sample_pixels(flow, variables, KEY, num=3, denoise=Denoising((0.1,)))
    step = jax.jit(functools.partial(denoised, flow))
    expected = step(variables, jnp.asarray(noisy), Condition(), 0.1)
    np.testing.assert_allclose(clean, expected, atol=1e-3)
    assert np.abs(clean - noisy).max() > 0.1


@pytest.mark.parametrize(
    ("noise", "expected"), [("uniform", [0, 0, 0, 1, 254, 255, 255, 0]),
                            ("gaussian", [0, 0, 1, 2, 255, 255, 255, 0])],
)  # fmt: skip
def test_values_are_rounded_as_the_noise_was_added(noise, expected):
    pixels = np.array([-7.0, 0.2, 0.9, 1.7, 254.6, 255.9, 700.0, np.nan], np.float32)
    actual = quantise(pixels.reshape(1, 2, 4, 1), noise)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual.ravel(), expected)


# Latents.


@pytest.mark.parametrize(("kind", "noise"), [("jet", "uniform"), ("tarflow", "gaussian")])
def test_images_come_back(kind, noise):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    sampler = Sampler(*setting(kind))
    z, logdet = latents.encode(sampler, images, LABEL, noise, batch_size=2)
    assert logdet.shape == (3,)
    pixels = sampler.decode(z, LABEL).pixels
    np.testing.assert_allclose(pixels, images + latents.centre(noise), rtol=0, atol=5e-3)
    np.testing.assert_array_equal(quantise(pixels, noise), images)
    assert np.abs(sampler.decode(z, LABEL[::-1]).pixels - pixels).max() > 0.1


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
    ("kind", "guidance", "stages"), [("jet", None, 4), ("tarflow", Guidance(2.0), 2)]
)
def test_a_trace_ends_at_the_sample(kind, guidance, stages):
    """Of a Jet by its couplings, of which the last is undone first."""
    sampler = Sampler(*setting(kind), guidance=guidance)
    z = jnp.asarray(sampler.latents(KEY, np.arange(3)))
    images = latents.trace(sampler, z, LABEL)
    assert images.shape == (stages, 3, 4, 4, 1)
    np.testing.assert_allclose(images[0], sampler.flow.pixels.inverse(z)[0], atol=1e-3)
    np.testing.assert_allclose(images[-1], sampler.decode(z, LABEL).pixels, atol=1e-2)
    assert (np.abs(np.diff(images, axis=0)).max((1, 2, 3, 4)) > 1).all()
    if kind == "jet":
        last = jax.tree.map(lambda leaf: leaf[2:], sampler.variables)
        one = flow_laws.jet(num_classes=3, dtype="float32", num_couplings=1)
        expected, _ = one.apply(last, z, LABEL, method="inverse")
        np.testing.assert_allclose(images[1], expected, atol=1e-3)


# What is refused.


@pytest.mark.parametrize(
    ("kind", "num_classes", "fields", "message"),
    [
        ("tarflow", 3, {"label": 3}, "label 3 is out of range"),
        ("tarflow", 3, {"label": -2}, "label -2 is out of range"),
        ("tarflow", 3, {"label": np.array([0, 9])}, "label 9 is out of range"),
        ("tarflow", 0, {"label": 1}, "trained without labels"),
        ("tarflow", 3, {"guidance": Guidance(1.0)}, "the images have no labels"),
        ("tarflow", 3, {"guidance": Guidance(1.0), "label": -1}, "the images have no labels"),
        ("jet", 3, {"label": 1, "guidance": Guidance(1.0)}, "guidance is 1.0, but needs a TarFlow"),
        ("tarflow", 0, {"guidance": Guidance(1.0)}, "attention temperature other than 1"),
        ("tarflow", 3, {"guidance": Guidance(1.0, "c")}, "guide_what is 'c'"),
        ("tarflow", 3, {"guidance": Guidance(1.0, temperature=0.0)}, "attention temperature is 0"),
        ("tarflow", 3, {"guidance": Guidance(float("nan"))}, "guidance is nan"),
        ("tarflow", 3, {"num": 0}, "num is 0"),
        ("tarflow", 3, {"batch_size": 0}, "batch_size is 0"),
        ("tarflow", 3, {"temperature": -1.0}, "temperature is -1.0"),
        ("tarflow", 3, {"denoise": float("nan")}, "denoise is nan"),
        ("tarflow", 3, {"method": "fast"}, "method is 'fast'; expected cached or jacobi"),
        ("jet", 3, {"method": "jacobi"}, "Jet is inverted in one pass"),
        ("tarflow", 3, {"method": [Decoding()] * 2}, "2 decodings for the 1 blocks"),
        ("tarflow", 3, {"method": [Decoding(0)]}, "window is 0"),
        ("tarflow", 3, {"method": [Decoding(2, float("nan"))]}, "tolerance is nan"),
        ("tarflow", 3, {"method": [Decoding(cache_dtype="int4")]}, "cache_dtype is 'int4'"),
    ],
)
def test_impossible_wishes_are_refused(kind, num_classes, fields, message):
    with pytest.raises(UsageError, match=message):
        jetflow.sample(*setting(kind, num_classes), KEY, **{"num": 2, **fields})
