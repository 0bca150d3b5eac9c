"""Held-out bits per dimension: right on a known density, and a property of the example alone."""

import dataclasses
import functools
import math

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jetflow
from jetflow import likelihood, noise, sharding
from jetflow.data.dataset import Dataset
from jetflow.evals import likelihoods as bpd
from jetflow.evals.batching import Batching
from jetflow.evals.evaluation import spread
from jetflow.evals.records import describe
from jetflow.flows.stack import check_labels
from jetflow.noise import Noise, keys_by_example
from jetflow.types import Condition, UsageError

KEY = jax.random.key(3)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (7, 4, 4, 1)), jnp.uint8)
DRAWS = 12
LABEL = jnp.array([0, 2, -1, 1, 1, -1, 0])


@pytest.fixture(scope="module")
def flow():
    return flow_laws.tarflow(num_classes=3, num_blocks=1, dtype="float32")


@pytest.fixture(scope="module")
def variables(flow):
    return flow_laws.random_variables(flow, jnp.float32)


@pytest.fixture(scope="module")
def identity():
    """A flow whose density is known: pixel v becomes the latent v/127.5 − 1."""
    flow = flow_laws.jet(dtype="float32", num_couplings=1)
    init = jax.jit(flow.init)
    return flow, init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 4, 4, 1)))


def bits_of_identity(second_moment: float) -> float:
    """E[−log2 p] of a latent with this second moment."""
    return (0.5 * (second_moment + math.log(2 * math.pi)) + math.log(127.5)) / math.log(2)


def test_value_by_hand(identity):
    key = keys_by_example(KEY, jnp.arange(7))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (4, 4, 1)))(key)
    z = (np.asarray(IMAGES, np.float64) + np.asarray(drawn)) / 127.5 - 1
    expected = [bits_of_identity((one**2).mean()) for one in z]
    actual = jetflow.bits_per_dim(*identity, IMAGES, None, KEY)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("how", [Noise("uniform"), Noise("gaussian", std=0.3)])
def test_mean_on_a_known_density(identity, how):
    """Against the expectation in closed form."""
    image, count = jnp.full((1, 4, 4, 1), 40, jnp.uint8), 2000
    offset, variance = (0.5, 1 / 12 / 127.5**2) if how.kind == "uniform" else (0.0, 0.3**2)
    expected = bits_of_identity(((40 + offset) / 127.5 - 1) ** 2 + variance)
    bits = jetflow.bits_per_dim(*identity, jnp.tile(image, (count, 1, 1, 1)), None, KEY, noise=how)
    assert bits.std() > 0
    assert abs(bits.mean() - expected) < 5 * bits.std() / math.sqrt(count) + 1e-6


def test_an_image_has_its_bits_whatever_the_batch(flow, variables):
    """They depend on its number, key and label alone."""
    bits = functools.partial(jetflow.bits_per_dim, flow, variables)
    whole = bits(IMAGES, LABEL, KEY)
    order = jnp.array([5, 2, 6, 0, 1, 3, 4])
    shuffled = bits(IMAGES[order], LABEL[order], KEY, index=order)
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-6)
    part = bits(IMAGES[3:], LABEL[3:], KEY, index=jnp.arange(3, 7))
    np.testing.assert_allclose(part, whole[3:], rtol=1e-6)
    assert (whole != bits(IMAGES, LABEL, jax.random.key(4))).all()
    assert (whole != bits(IMAGES, (LABEL + 2) % 3, KEY)).all()
    no_label = bits(IMAGES, None, KEY)
    np.testing.assert_allclose(no_label[LABEL == -1], whole[LABEL == -1], rtol=1e-6)
    assert (no_label != whole)[LABEL != -1].all()


@pytest.mark.parametrize("label", [np.array([0, 1, 3]), np.zeros(2, int), np.zeros(3)])
def test_impossible_labels_are_refused(label, flow):
    with pytest.raises(UsageError, match=r"label 3 is out of range|expected one integer, or 3"):
        check_labels(flow, label, 3)


# Over a split.


@pytest.fixture(scope="module")
def dataset():
    source = [
        {"image": np.asarray(image), "label": int(label) % 3}
        for image, label in zip(IMAGES, LABEL, strict=True)
    ]
    return Dataset("seven", "1.0.0", "test", (4, 4, 1), 3, source)


def density(flow, variables, batch_size=4, **fields):
    batching = Batching(sharding.make_mesh(data=-1, fsdp=1), batch_size)
    return bpd.Density(flow, variables, batching, seed=2, **fields)


@pytest.mark.parametrize(("batch_size", "draws"), [(4, 4), (16, 1)])
def test_each_example_counts_once(flow, variables, dataset, batch_size, draws):
    """Whether the last batch is padded or not; it is read once for all draws, each of its key."""
    keys = [noise.key_for(2, draw, noise.Purpose.EVALUATE) for draw in range(draws)]
    bits = np.stack([jetflow.bits_per_dim(flow, variables, IMAGES, LABEL % 3, k) for k in keys])
    reads, polls = [], []

    class Counted(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    counted = dataclasses.replace(dataset, source=Counted(dataset.source))
    measured = density(flow, variables, batch_size, draws=draws).likelihood(
        counted, lambda: polls.append(1)
    )
    assert sorted(reads) == list(range(7)) and len(polls) == -(-7 // batch_size)
    np.testing.assert_allclose(measured.bits, bits, rtol=1e-6)
    assert measured.mean == pytest.approx(float(bits.mean()), rel=1e-6)
    expected = np.std(bits.mean(1), ddof=1) / 2 if draws > 1 else math.nan
    assert measured.standard_error == pytest.approx(expected, rel=0.02, nan_ok=True)
    expected = np.std(bits.mean(0), ddof=1) / np.sqrt(7)
    assert measured.error_over_examples == pytest.approx(expected, rel=1e-4)
    assert measured.parts.sum() == pytest.approx(measured.mean, rel=1e-6)
    assert len(measured.parts) == 3
    assert draws == 1 or measured.importance_weighted < measured.mean - 1e-5


@pytest.mark.parametrize(("classes", "used"), [(3, bpd.UNIFORM), (0, Noise("gaussian", std=0.3))])
def test_record(classes, used, flow, variables, dataset):
    """Only uniform noise makes a bound of the mean of p, and only labels a conditional one."""
    data = dataclasses.replace(dataset, num_classes=classes)
    measured = density(flow, variables, noise=used, draws=2).likelihood(data)
    result = measured.record(step=1, weights="ema")
    assert result["conditional"] == bool(classes) == ("given the labels" in describe(result))
    assert (result["importance_weighted"] is None) == (used is not bpd.UNIFORM)


def test_some_examples_have_a_checksum_of_their_own(dataset):
    whole = dataclasses.replace(dataset, split="train", known_checksum="0123456789abcdef")
    some = spread(whole, 3)
    assert some.split == "train[:6:2]"
    expected = dataclasses.replace(dataset, source=dataset.source[:6:2]).checksum()
    assert some.checksum() == expected != whole.checksum()


# Labels by likelihoods.


def answers(flow, variables, dataset, by_gradient=False, **fields):
    measure, total = density(flow, variables, **fields), len(dataset)
    return measure.answers(measure.batching.of_data(dataset), total, by_gradient=by_gradient)


@pytest.mark.parametrize("how", [Noise("uniform"), Noise("gaussian", std=0.3)])
def test_answers(how, flow, variables, dataset):
    """By the mean of p over the draws, not that of log p."""
    keys = [noise.key_for(2, draw, noise.Purpose.EVALUATE) for draw in range(DRAWS)]
    bits = np.stack([
        [jetflow.bits_per_dim(flow, variables, IMAGES, labels, key, noise=how) for key in keys]
        for labels in jnp.arange(3)[:, None] * jnp.ones(7, int)
    ])  # fmt: skip
    probabilities = np.exp2(-16 * (bits.astype(np.float64) - bits.min())).mean(1)
    likely = probabilities.argmax(0)
    assert len(set(likely)) > 1
    if how.kind == "gaussian":
        assert (likely != bits.mean(1).argmin(0)).any()
    wrong = np.isin(np.arange(7), [1, 5])
    source = [
        {"image": np.asarray(image), "label": int(label)}
        for image, label in zip(IMAGES, (likely + wrong) % 3, strict=True)
    ]
    labelled = dataclasses.replace(dataset, source=source)
    found = answers(flow, variables, labelled, noise=how, draws=DRAWS)
    np.testing.assert_array_equal(found.answer, likely)
    np.testing.assert_array_equal(found.right, ~wrong)


def test_answers_by_gradient(flow, variables, dataset):
    """Against finite differences, along each class, of log p under a mixture of the classes."""
    (key,) = density(flow, variables).keys
    x = IMAGES + jax.vmap(lambda key: jax.random.uniform(key, (4, 4, 1)))(
        keys_by_example(key, jnp.arange(7))
    )
    bits = jax.jit(functools.partial(likelihood.eval_step, flow))
    shares = [jnp.tile(jax.nn.softmax(0.05 * row), (7, 1)) for row in jnp.eye(3)]
    by_class = np.stack([bits(variables, x, Condition(share)) for share in shares])
    found = answers(flow, variables, dataset, by_gradient=True, draws=1)
    np.testing.assert_array_equal(found.answer, by_class.argmin(0))
    assert len(set(found.answer)) > 1


def test_likelihoods_that_are_not_finite_are_of_no_label(flow, variables, dataset):
    """Not of the first one, which all of these have."""
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), variables)
    zeros = dataclasses.replace(
        dataset, source=[example | {"label": 0} for example in dataset.source]
    )
    for by_gradient in (False, True):
        found = answers(flow, broken, zeros, by_gradient, noise=bpd.UNIFORM)
        assert (found.answer == -1).all() and not found.right.any()
