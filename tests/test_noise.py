"""Every draw is a function of (seed, step, purpose), and has the distribution that it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.types import NO_LABEL, UsageError

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.integers(0, 256, (4000, 3, 4, 1)), jnp.uint8)
LABEL = jnp.asarray(RNG.integers(0, 5, 4000), jnp.int32)
ALL = Noise("gaussian", std=0.1, label_drop=0.3, flip=True)


def augment(how: Noise, *, seed=0, step=0, image=IMAGE):
    step = jnp.int32(step)
    x, condition = how.augment(image, LABEL, seed=seed, step=step, pixel_scale=127.5)
    return [x, *jax.tree.leaves(condition)]


def test_uniform_noise_fills_the_unit_above_the_pixel_value():
    x, label = augment(Noise("uniform"))
    assert x.dtype == jnp.float32
    added = np.asarray(x) - np.asarray(IMAGE, np.float32)
    assert (added >= 0).all()
    assert (added <= 1).all()  # 255 + the largest u < 1 rounds to 256
    assert abs(added.mean() - 0.5) < 5 * np.sqrt(1 / 12 / added.size)
    assert abs(added.var() - 1 / 12) < 1e-3
    np.testing.assert_array_equal(label, LABEL)


def test_gaussian_noise_is_measured_in_units_of_the_flow():
    added = np.asarray(augment(Noise("gaussian", std=0.1))[0]) - np.asarray(IMAGE, np.float32)
    assert abs(added.mean()) < 5 * 12.75 / np.sqrt(added.size)
    assert abs(added.std() / 12.75 - 1) < 0.02


MEAN = {"uniform": 0.2, "square": 0.2167, "lognormal": 0.1783}


@pytest.mark.parametrize("distribution", MEAN)
def test_each_image_has_noise_of_its_own_level(distribution):
    how = Noise("levels", t0=0.1, t1=0.3, distribution=distribution)
    x, _, levels = map(np.asarray, augment(how))
    assert levels.min() >= 0.1 and levels.max() <= 0.3
    assert len(np.unique(levels)) > len(levels) / 2
    assert levels.min() < 0.11 and levels.max() > 0.29
    assert abs(levels.mean() - MEAN[distribution]) < 0.003
    added = (x - np.asarray(IMAGE, np.float32)) / 127.5
    square = (added**2).mean((1, 2, 3))
    assert np.corrcoef(square, levels**2)[0, 1] > 0.5
    assert abs(square.mean() / (levels**2).mean() - 1) < 0.03


def test_weights_are_of_the_levels():
    level = jnp.array([0.1, 0.2])
    weights = {kind: Noise("levels", t0=0.1, t1=0.3, weight=kind) for kind in ("t", "t2", "1")}
    weights = {kind: how.weights(level) for kind, how in weights.items()}
    np.testing.assert_allclose(weights["t"], level)
    np.testing.assert_allclose(weights["t2"], level**2)
    np.testing.assert_allclose(weights["1"], 1)
    assert Noise().weights(None) is None


def test_half_of_the_images_are_mirrored_left_to_right():
    x = np.rint(np.asarray(augment(Noise("gaussian", std=1e-4, flip=True))[0])).astype(np.uint8)
    image = np.asarray(IMAGE)
    same, mirrored = (x == image).all((1, 2, 3)), (x == image[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.04


def test_labels_are_dropped_one_by_one_at_their_rate():
    label = np.asarray(augment(Noise("uniform", label_drop=0.3))[1])
    dropped = label == NO_LABEL
    assert abs(dropped.mean() - 0.3) < 0.035
    np.testing.assert_array_equal(label[~dropped], np.asarray(LABEL)[~dropped])
    for part in np.split(dropped, 40):  # no batch as a whole
        assert 0 < part.mean() < 1


def test_draws_depend_on_seed_and_step_alone():
    first, again = augment(ALL, seed=1, step=7), augment(ALL, seed=1, step=7)
    others = [augment(ALL, seed=1, step=8), augment(ALL, seed=2, step=7)]
    for drawn, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(drawn, same)
    for other in others:
        for drawn, different in zip(first, other, strict=True):
            assert (drawn != different).mean() > 0.3


def test_a_draw_does_not_depend_on_what_else_is_drawn():
    """Switching one kind of noise on leaves the others' draws as they are."""
    only_drop = augment(dataclasses.replace(ALL, kind="uniform", std=0.0, flip=False))
    np.testing.assert_array_equal(only_drop[1], augment(ALL)[1])


def test_purposes_have_draws_of_their_own():
    draws = [jax.random.bits(key_for(3, 5, purpose), (8,)) for purpose in Purpose]
    assert len(np.unique(np.stack(draws), axis=0)) == len(Purpose)


@pytest.mark.parametrize(
    "kind", [Noise("uniform"), Noise("gaussian", std=0.1), Noise("levels", t0=0.01, t1=0.3)]
)
def test_noise_by_example_depends_on_the_key_and_the_index_alone(kind):
    key = jax.random.key(0)
    index = jnp.array([4, 0, 9, -1])
    x, _ = kind.add_by_example(IMAGE[index], keys_by_example(key, index), 128.0)
    for row, one in enumerate(index):
        alone, _ = kind.add_by_example(IMAGE[one][None], keys_by_example(key, one[None]), 128.0)
        np.testing.assert_array_equal(x[row], alone[0])
    added = np.asarray(x) - np.asarray(IMAGE[index], np.float32)
    assert len(np.unique(added.round(3), axis=0)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "laplace"}, "config.noise.kind is 'laplace'; expected one of uniform, gau"),
        ({"kind": "uniform", "std": 0.1}, "config.noise.std is 0.1 with uniform noise"),
        ({"kind": "gaussian"}, "config.noise.std is 0.0 with gaussian noise"),
        ({"label_drop": 1.0}, "config.noise.label_drop is 1.0; expected 0 <= p < 1"),
    ],
)
def test_impossible_noise_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Noise(**fields)
