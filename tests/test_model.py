"""A trained flow in Python."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

import jetflow
from jetflow.data import dataset as pipeline
from jetflow.evals import likelihoods
from jetflow.evals.batching import Batching
from jetflow.sampling.ancestral import quantise
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def gaussian(trained):
    """A TarFlow with labels, trained with gaussian noise."""
    return jetflow.load_model(trained("tarflow"))


@pytest.fixture(scope="module")
def uniform(trained):
    return jetflow.load_model(trained("jet"))


@pytest.fixture(scope="module")
def digits(data_dir):
    """The first images of the test split, and their labels."""
    batch = next(pipeline.eval_batches(pipeline.load("digits", "test"), batch_size=12))
    return batch.image, batch.label


def test_samples_are_quantised_as_the_noise_of_the_training_asks(gaussian, uniform):
    for model, kind in ((gaussian, "gaussian"), (uniform, "uniform")):
        images = model.sample(12, seed=3)
        (drawn,) = model.draw(
            SamplingOptions(), num=12, label=np.arange(12) % 10, seed=3, batch_size=12
        )
        np.testing.assert_array_equal(images, quantise(drawn.pixels, kind))
        other = quantise(drawn.pixels, "uniform" if kind == "gaussian" else "gaussian")
        assert (images != other).any()


def test_labels_defaults_and_fields(gaussian):
    images = gaussian.sample(12)
    np.testing.assert_array_equal(gaussian.sample(12, label=np.arange(12) % 10), images)
    assert (gaussian.sample(12, label=3) != images).any()
    as_the_run = {
        name: gaussian.config["eval"][name] for name in ("temperature", "guidance", "denoise")
    }
    assert as_the_run["guidance"] and as_the_run["denoise"]
    by_default = gaussian.sample(12, defaults="run")
    np.testing.assert_array_equal(by_default, gaussian.sample(12, **as_the_run))
    assert (gaussian.sample(12, defaults="run", guidance=0.0) != by_default).any()


def test_bits_are_those_of_the_evaluation(uniform, digits):
    """Also inside jit, where the labels count."""
    images, label = digits
    bits = uniform.bits_per_dim(images, label)
    dataset = pipeline.load("digits", "test")
    density = likelihoods.Density(uniform.flow, uniform.variables, Batching(uniform.mesh, 99))
    measured = density.likelihood(dataset)
    np.testing.assert_allclose(bits, measured.bits[0, :12], rtol=1e-5)
    jitted = jax.jit(uniform.bits_per_dim)
    np.testing.assert_allclose(jitted(images, label), bits, rtol=1e-5)
    assert (np.abs(jitted(images, (label + 1) % 10) - bits) > 1e-4).any()
    np.testing.assert_array_equal(uniform.bits_per_dim(images.astype(np.float32), label), bits)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: x / 255, r"floats in \[0, 1\].*255 \* images"),
        (lambda x: x + 0.25, "the value 0.25; expected whole pixel values"),
        (lambda x: x.astype(int) - 1, "the value -1"),
    ],
)
def test_images_that_cannot_be_pixels_are_refused(convert, message, uniform, digits):
    with pytest.raises(UsageError, match=message):
        uniform.bits_per_dim(convert(digits[0]))
    with pytest.raises(UsageError, match=message):
        uniform.encode(convert(digits[0]))


def test_traced_floats_are_refused(uniform, digits):
    with pytest.raises(UsageError, match=r"float32 inside jax\.jit"):
        jax.jit(uniform.bits_per_dim)(digits[0] / np.float32(255))


@pytest.mark.parametrize("name", ["gaussian", "uniform"])
def test_decoding_undoes_encoding(name, digits, request):
    model = request.getfixturevalue(name)
    images, label = digits
    z, logdet = model.encode(images, label, batch_size=5)
    np.testing.assert_array_equal(model.decode(z, label, batch_size=7), images)
    x = jnp.asarray(images) + (0.5 if name == "uniform" else 0.0)
    expected, expected_logdet = model.flow.apply(
        model.variables, x, jnp.asarray(label), method="forward"
    )
    np.testing.assert_allclose(z, expected, atol=1e-4)
    np.testing.assert_allclose(logdet, expected_logdet, rtol=1e-5)
    assert (np.abs(model.encode(images, (label + 1) % 10, batch_size=5)[0] - z) > 1e-4).any()


def test_a_model_is_one_line(gaussian):
    text = repr(gaussian)
    assert "\n" not in text and len(text) < 250
    for part in ("tarflow", "8x8x1", "10 classes", "gaussian", "ema", f"step {tiny_runs.STEPS}"):
        assert part in text


def test_bad_input(gaussian, uniform):
    with pytest.raises(UsageError, match="defaults is 'train'; expected \"run\""):
        gaussian.sample(2, defaults="train")
    with pytest.raises(UsageError, match="denoise needs a flow trained with gaussian noise"):
        uniform.sample(2, denoise=True)
    with pytest.raises(UsageError, match="label 10 is out of range"):
        gaussian.sample(2, label=10)


def test_importing_jetflow_imports_no_jax():
    """So that `jetflow --version` answers at once; the names are there all the same."""
    code = "import sys, jetflow; assert 'jax' not in sys.modules; assert 'sample' in dir(jetflow)"
    subprocess.run([sys.executable, "-c", code], check=True, env=tiny_runs.environment())
    assert all(getattr(jetflow, name) for name in jetflow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jetflow.nothing
