"""The sampler: what an image depends on, the denoising step, rounding, and what is refused."""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jetflow
from jetflow import likelihood
from jetflow.noise import keys_by_example
from jetflow.sampling.ancestral import Sampler, denoised, draw_all, quantise
from jetflow.types import Guidance, UsageError

KEY = jax.random.key(7)


@functools.cache
def setting(kind: str = "tarflow", num_classes: int = 3):
    small = {"jet": {"num_couplings": 2}, "tarflow": {"num_blocks": 1}}[kind]
    flow = getattr(flow_laws, kind)(num_classes=num_classes, dtype="float32", **small)
    return flow, flow_laws.random_variables(flow, jnp.float32)


def sample_pixels(flow, variables, key, *, num, label=None, batch_size=64, **settings):
    """`jetflow.sample` before rounding."""
    sampler = Sampler(flow, variables, **settings)
    batches = draw_all(sampler, key, num=num, label=label, batch_size=batch_size)
    return np.concatenate([drawn.pixels for drawn in batches])


def prior_noise(flow, num: int):
    """The latents of images 0 to num − 1."""
    keys = keys_by_example(KEY, jnp.arange(num))
    return jax.vmap(lambda key: jax.random.normal(key, flow.latent_shape))(keys)


def inverse(flow, variables, z, label=None):
    return jax.jit(functools.partial(flow.apply, method="inverse"))(variables, z, label)[0]


# What image i depends on.


@pytest.mark.parametrize("kind", ["jet", pytest.param("tarflow", marks=pytest.mark.slow)])
def test_an_image_depends_on_its_number_alone(kind):
    flow, variables = setting(kind)
    label = np.array([0, 1, 2, -1, 1])
    whole = jetflow.sample(flow, variables, KEY, num=5, label=label)
    assert whole.shape == (5, 4, 4, 1)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole, axis=0)) == 5
    in_parts = jetflow.sample(flow, variables, KEY, num=5, label=label, batch_size=2)
    np.testing.assert_array_equal(in_parts, whole)
    fewer = jetflow.sample(flow, variables, KEY, num=3, label=label[:3], batch_size=2)
    np.testing.assert_array_equal(fewer, whole[:3])


def test_a_sample_is_the_inverse_of_prior_noise():
    flow, variables = setting()
    label = jnp.array([2, 2, 2])
    z = prior_noise(flow, 3)
    for temperature in (1.0, 0.5):
        pixels = sample_pixels(flow, variables, KEY, num=3, label=2, temperature=temperature)
        expected = inverse(flow, variables, temperature * z, label)
        np.testing.assert_allclose(pixels, expected, rtol=1e-4, atol=1e-2)


def test_samples_have_the_learned_variance():
    flow = flow_laws.tarflow(volume_preserving=True, num_blocks=1, dtype="float32")
    variables = flow_laws.random_variables(flow, jnp.float32)
    variance = jnp.asarray(np.random.default_rng(0).uniform(0.2, 3, flow.latent_shape), jnp.float32)
    variables = variables | {"prior": {"variance": variance}}
    expected = inverse(flow, variables, jnp.sqrt(variance) * prior_noise(flow, 3))
    np.testing.assert_allclose(
        sample_pixels(flow, variables, KEY, num=3), expected, atol=1e-3
    )  # fmt: skip


def test_labels_and_guidance_at_rest():
    """One label for all is a label for each, −1 is none, guidance 0 is none."""
    flow, variables = setting()
    pixels = functools.partial(sample_pixels, flow, variables, KEY, num=3)
    np.testing.assert_array_equal(pixels(label=1), pixels(label=np.array([1, 1, 1])))
    np.testing.assert_allclose(pixels(label=-1), pixels(), atol=1e-3)
    np.testing.assert_array_equal(pixels(label=1, guidance=Guidance(0.0)), pixels(label=1))
    guided = pixels(label=1, guidance=Guidance(2.0))
    assert np.abs(guided - pixels(label=1)).max() > 0.1


def test_guidance_needs_labels_or_a_temperature():
    flow, variables = setting()
    for label in (None, -1, np.array([-1, -1, -1])):
        with pytest.raises(UsageError, match="the images have no labels"):
            jetflow.sample(flow, variables, KEY, num=3, label=label, guidance=Guidance(1.0))
    guidance = Guidance(1.0, temperature=0.5)
    guided = jetflow.sample(flow, variables, KEY, num=3, guidance=guidance)
    assert (guided != jetflow.sample(flow, variables, KEY, num=3)).any()


def test_images_that_are_not_finite_are_warned_of():
    flow, variables = setting()
    with pytest.warns(RuntimeWarning, match="3 of 3 images are not finite, and black"):
        jetflow.sample(flow, variables, KEY, num=3, temperature=1e38)


# Denoising.


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
            moved = step(variables, x, label, std) - x
            expected = (std * 128) ** 2 * score.reshape(x.shape)
            np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-9)


def test_samples_are_denoised():
    flow, variables = setting("tarflow", 0)
    noisy = sample_pixels(flow, variables, KEY, num=3)
    clean = sample_pixels(flow, variables, KEY, num=3, denoise=0.1)
    expected = jax.jit(functools.partial(denoised, flow))(variables, jnp.asarray(noisy), None, 0.1)
    np.testing.assert_allclose(clean, expected, atol=1e-3)
    assert np.abs(clean - noisy).max() > 0.1


# Rounding.


@pytest.mark.parametrize(
    ("noise", "expected"), [("uniform", [0, 0, 0, 1, 254, 255, 255, 0]),
                            ("gaussian", [0, 0, 1, 2, 255, 255, 255, 0])],
)  # fmt: skip
def test_values_are_rounded_as_the_noise_was_added(noise, expected):
    pixels = np.array([-7.0, 0.2, 0.9, 1.7, 254.6, 255.9, 700.0, np.nan], np.float32)
    actual = quantise(pixels.reshape(1, 2, 4, 1), noise)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual.ravel(), expected)


def test_dequantised_images_come_back():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    u = np.random.default_rng(0).uniform(0, 0.999, image.shape).astype(np.float32)
    np.testing.assert_array_equal(quantise(image + u, "uniform"), image)
    np.testing.assert_array_equal(quantise(image + 0.4 * (2 * u - 1), "gaussian"), image)


# What is refused.


@pytest.mark.parametrize(
    ("kind", "num_classes", "fields", "message"),
    [
        ("tarflow", 3, {"label": 3}, "label 3 is out of range; expected 0 to 2, or -1"),
        ("tarflow", 3, {"label": -2}, "label -2 is out of range"),
        ("tarflow", 3, {"label": np.array([0, 9])}, "label 9 is out of range"),
        ("tarflow", 0, {"label": 1}, "this flow was trained without labels; leave it out"),
        ("jet", 3, {"label": 1, "guidance": Guidance(1.0)}, "guidance is 1.0, but needs a TarFlow"),
        ("tarflow", 0, {"guidance": Guidance(1.0)}, "needs an attention temperature other than 1"),
        ("tarflow", 3, {"guidance": Guidance(1.0, "c")}, "guide_what is 'c'; expected a"),
        ("tarflow", 3, {"guidance": Guidance(1.0, temperature=0.0)}, "attention temperature is 0"),
        ("tarflow", 3, {"num": 0}, "num is 0; expected 1 or more"),
        ("tarflow", 3, {"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ("tarflow", 3, {"temperature": -1.0}, "temperature is -1.0; expected 0 or more"),
        ("tarflow", 3, {"denoise": float("nan")}, "denoise is nan; expected 0 or more"),
        ("tarflow", 3, {"method": "fast"}, "method is 'fast'; expected cached or jacobi"),
    ],
)
def test_impossible_wishes_are_refused(kind, num_classes, fields, message):
    flow, variables = setting(kind, num_classes)
    with pytest.raises(UsageError, match=message):
        jetflow.sample(flow, variables, KEY, **{"num": 2, **fields})
