"""The schedule, the two papers' weight-decay rules, the clipping: against updates by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jetflow import optim
from jetflow.types import UsageError

FIELDS = {"total_steps": 100, "lr": 1e-2, "min_lr": 1e-3, "warmup": 0.1, "b1": 0.9, "b2": 0.95}
FIELDS |= {"eps": 1e-8, "weight_decay": 0.3, "decay_rule": "lr", "clip_norm": 0.0}
FIELDS |= {"mu_dtype": "float32"}
GRADIENTS = ({"a": 2.0, "b": -0.5}, {"a": -1.0, "b": 3.0}, {"a": 0.25, "b": 1.0})
PARAMS = {"a": jnp.array(5.0), "b": jnp.array(-7.0)}


def adam(**fields):
    return optim.adam(**FIELDS | fields)


@pytest.mark.parametrize("min_lr", [0.0, 1e-3])
def test_schedule_rises_linearly_and_falls_as_a_cosine(min_lr):
    _, schedule = adam(min_lr=min_lr)
    values = np.array([schedule(step) for step in (0, 5, 10, 55, 100)])
    mean = (1e-2 + min_lr) / 2
    np.testing.assert_allclose(values, [min_lr, mean, 1e-2, mean, min_lr], rtol=1e-5, atol=1e-9)
    assert adam(warmup=0.0, min_lr=min_lr)[1](0) == pytest.approx(1e-2)


@pytest.mark.parametrize("rule", optim.DECAY_RULES)
def test_updates_follow_the_rule(rule):
    """Three steps of Adam with decoupled decay, written out."""
    tx, _ = adam(decay_rule=rule)
    params, state = PARAMS, tx.init(PARAMS)
    expected = {name: float(value) for name, value in PARAMS.items()}
    mu, nu = dict.fromkeys(PARAMS, 0.0), dict.fromkeys(PARAMS, 0.0)
    for step, gradient in enumerate(GRADIENTS):
        updates, state = tx.update(jax.tree.map(jnp.array, gradient), state, params)
        params = optax.apply_updates(params, updates)
        lr = 1e-3 + (1e-2 - 1e-3) * step / 10
        decay = {"lr": lr * 0.3, "schedule": lr / 1e-2 * 0.3}[rule]
        for name, g in gradient.items():
            mu[name] = 0.9 * mu[name] + 0.1 * g
            nu[name] = 0.95 * nu[name] + 0.05 * g**2
            direction = mu[name] / (1 - 0.9 ** (step + 1))
            direction /= (nu[name] / (1 - 0.95 ** (step + 1))) ** 0.5 + 1e-8
            expected[name] -= lr * direction + decay * expected[name]
    for name in PARAMS:
        assert abs(params[name] / float(PARAMS[name]) - 1) > 1e-4  # it moves
        assert float(params[name]) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_gradient_is_clipped_by_its_global_norm(clip_norm):
    """As Adam hides the gradient's scale, look at its first moment."""
    tx, _ = adam(clip_norm=clip_norm)
    _, state = tx.update({"a": jnp.array(3.0), "b": jnp.array(-4.0)}, tx.init(PARAMS), PARAMS)
    scale = 0.5 / 5 if clip_norm == 0.5 else 1.0
    mu = optax.tree.get(state, "mu")
    assert float(mu["a"]) == pytest.approx(0.1 * 3 * scale, rel=1e-5)
    assert float(mu["b"]) == pytest.approx(-0.1 * 4 * scale, rel=1e-5)


def test_first_moment_is_kept_in_its_dtype():
    tx, _ = adam(mu_dtype="bfloat16")
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert optax.tree.get(state, "mu")["a"].dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["a"].dtype == updates["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay_rule": "none"}, "config.optim.decay_rule is 'none'; expected one of lr, schedule"),
        ({"warmup": 1.5}, "config.optim.warmup is 1.5"),
        ({"lr": 0.0}, "config.optim.lr is 0.0"),
        ({"mu_dtype": "int8"}, "config.optim.mu_dtype is 'int8'"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        adam(**fields)


NESTED = {"blocks_0": {"position": jnp.array([3.0, -1.0])}, "head": {"kernel": jnp.array([2.0])}}
NESTED |= {"blocks_1": {"position": jnp.array([0.5, 1.5])}}


def two_updates(**fields):
    tx, _ = adam(**fields)
    state = tx.init(NESTED)
    for scale in (1.0, -3.0):
        gradients = jax.tree.map(lambda p, scale=scale: scale * p**2, NESTED)
        updates, state = tx.update(gradients, state, NESTED)
    return updates, state


@pytest.mark.parametrize("rule", optim.DECAY_RULES)
def test_multipliers_multiply_the_update_with_its_decay(rule):
    """The first that matches counts; all else is as without them, to the last bit."""
    multipliers = (("/blocks_0/", 0.25), ("position", 3.0))
    plain, _ = two_updates(decay_rule=rule)
    updates, _ = two_updates(decay_rule=rule, multipliers=multipliers)
    for path, factor in {"blocks_0": 0.25, "blocks_1": 3.0, "head": 1.0}.items():
        ((_, one),), ((_, other),) = plain[path].items(), updates[path].items()
        np.testing.assert_array_equal(other, factor * one)
        assert np.abs(one).min() > 1e-5


def test_a_factor_of_0_freezes():
    """No update, also where there is decay; no moments; no part in the norm that is clipped."""
    updates, state = two_updates(multipliers=(("blocks", 0),), clip_norm=0.5)
    np.testing.assert_array_equal(updates["blocks_0"]["position"], 0)
    arrays = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert arrays.count((1,)) == 2 and (2,) not in arrays
    alone, _ = adam(clip_norm=0.5)
    head = {"head": NESTED["head"]}
    others, inner = {"head": {"kernel": jnp.array([4.0])}}, alone.init(head)
    for scale in (1.0, -3.0):
        expected, inner = alone.update(jax.tree.map(lambda g, s=scale: s * g, others), inner, head)
    np.testing.assert_array_equal(updates["head"]["kernel"], expected["head"]["kernel"])


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ((("blocks_7", 1),), "'blocks_7', which is the first to match no parameter; .* /blocks_0/"),
        ((("blocks", 1), ("blocks_1", 2)), "'blocks_1', which is the first to match no"),
        ((("", 0),), "freezes every parameter"),
        ((("head", -1),), r"\('head', -1\), which is no regex with a factor of 0, .*factor is -1"),
        ((("head", float("nan")),), "the factor is nan"),
        ((("(", 1),), "no regex with a factor"),
        (("head", 0.1), "has 'head', which is no regex with a factor"),
    ],
)
def test_bad_multipliers(multipliers, message):
    tx, _ = adam(multipliers=multipliers)
    with pytest.raises(UsageError, match=message):
        tx.init(NESTED)
