"""The training step, in float32 as in production."""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jetflow import likelihood
from jetflow.noise import Noise
from jetflow.training import step
from jetflow.training.step import Trainer, TrainState
from jetflow.types import Batch, Condition

RNG = np.random.default_rng(0)
BATCH = Batch(
    jnp.asarray(RNG.integers(0, 256, (8, 4, 4, 1)), jnp.uint8),
    jnp.asarray(RNG.integers(0, 3, 8), jnp.int32),
    jnp.arange(8),
)
FLOWS = {
    "jet": lambda: flow_laws.jet(num_classes=3, dtype="float32"),
    "volume preserving": lambda: flow_laws.tarflow(
        num_classes=3, volume_preserving=True, dtype="float32"
    ),
}
SGD = optax.sgd(0.1)  # linear in the gradient, unlike Adam


def trainer(flow, **fields) -> Trainer:
    noise = Noise("uniform", label_drop=0.3, flip=True)
    return Trainer(flow, SGD, optax.constant_schedule(0.1), noise, seed=5, **fields)


def initial_state(flow, ema: bool = False) -> TrainState:
    """As `Trainer.first_state` makes it, but on random parameters."""
    variables = flow_laws.random_variables(flow, jnp.float32)
    params = variables.pop("params")
    average = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params) if ema else None
    return TrainState(jnp.int32(3), params, variables, SGD.init(params), average)


def step_of(name: str, accumulation: int = 1, ema_decay: float = 0.0):
    """(state before, state after, metrics) of one step."""
    flow = FLOWS[name]()
    state = initial_state(flow, ema=ema_decay > 0)
    one = trainer(flow, accumulation=accumulation, ema_decay=ema_decay)
    after, metrics = jax.jit(one.train_step)(state, BATCH)
    return jax.tree.map(np.asarray, (state, after, metrics))


one_step = functools.cache(step_of)
IN_PARTS = ("volume preserving", 4, 0.8)


def assert_close(actual, expected, rtol=1e-6, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("name", FLOWS)
def test_a_step_moves_parameters_and_the_clock_but_no_constants(name):
    before, after, _ = one_step(name)
    assert after.step == before.step + 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
    frozen = [path for path, size in jax.tree_util.tree_leaves_with_path(moved) if size == 0]
    assert not frozen
    assert set(after.collections) == {"jet": {"constants"}, "volume preserving": {"prior"}}[name]
    if name == "jet":
        jax.tree.map(np.testing.assert_array_equal, after.collections, before.collections)


def accumulation_changes_nothing(parts) -> None:
    _, whole, whole_metrics = one_step("volume preserving")
    _, after, metrics = parts
    assert_close(after.params, whole.params, rtol=2e-6)
    assert_close(after.collections, whole.collections)
    for key in ("bpd", "bpd_prior", "bpd_logdet", "gradient_norm"):
        assert_close(metrics[key], whole_metrics[key], rtol=1e-5)


def test_accumulation_changes_nothing():
    accumulation_changes_nothing(one_step(*IN_PARTS))


def test_bug_is_caught_sum_of_the_parts(monkeypatch):
    real = Trainer._gradients

    def wrong(self, *args):
        return jax.tree.map(lambda leaf: leaf * self.accumulation, real(self, *args))

    monkeypatch.setattr(Trainer, "_gradients", wrong)
    with pytest.raises(AssertionError):
        accumulation_changes_nothing(step_of(*IN_PARTS))


def moving_average_follows_the_new_parameters(found) -> None:
    before, after, _ = found
    expected = jax.tree.map(lambda ema, new: 0.8 * ema + 0.2 * new, before.ema, after.params)
    assert_close(after.ema, expected)
    assert after.variables()["params"] is after.ema


def test_moving_average_follows_the_new_parameters():
    moving_average_follows_the_new_parameters(one_step(*IN_PARTS))
    assert one_step("jet")[1].ema is None
    assert one_step("jet")[1].variables()["params"] is one_step("jet")[1].params


def test_bug_is_caught_decay_of_the_wrong_side(monkeypatch):
    real = step._average
    monkeypatch.setattr(step, "_average", lambda ema, new, decay: real(ema, new, 1 - decay))
    with pytest.raises(AssertionError):
        moving_average_follows_the_new_parameters(step_of(*IN_PARTS))


def noisy(flow, state):
    """The input of the step after `state`, by the public pieces."""
    how = trainer(flow).noise
    return how.augment(
        BATCH.image, BATCH.label, seed=5, step=jnp.int32(state.step), pixel_scale=flow.pixels.scale
    )


@pytest.mark.parametrize("name", FLOWS)
def test_metrics_are_of_the_parameters_before_the_step(name):
    flow, (before, _, metrics) = FLOWS[name](), one_step(name)
    x, condition = noisy(flow, before)
    variables = {"params": before.params, **before.collections}
    z, logdet = jax.jit(functools.partial(flow.apply, method="forward"))(variables, x, *condition)
    variance = likelihood.prior_variance(variables)
    prior = likelihood.bits_per_dim(likelihood.prior_nll(z, variance), z).mean()
    assert_close(metrics["bpd_prior"], prior)
    assert_close(metrics["bpd_logdet"], likelihood.bits_per_dim(-logdet, z).mean())
    assert_close(metrics["bpd"], metrics["bpd_prior"] + metrics["bpd_logdet"])
    scales = [value for key, value in sorted(metrics.items()) if key.startswith("output_scale")]
    assert len(scales) == 2
    assert_close(scales[-1], jnp.sqrt(jnp.mean(z**2)))


@pytest.mark.parametrize("name", FLOWS)
def test_evaluation_agrees_with_the_training_metric(name):
    """Also where the prior is learned; the gradient is then of another objective."""
    flow, (before, _, metrics) = FLOWS[name](), one_step(name)
    variables = {"params": before.params, **before.collections}
    bits = jax.jit(functools.partial(likelihood.eval_step, flow))(variables, *noisy(flow, before))
    assert bits.shape == (8,)
    assert_close(bits.mean(), metrics["bpd"])
    assert ("objective" in metrics) == (name == "volume preserving")


WITH_PARTS = FLOWS | {"tarflow": lambda: flow_laws.tarflow(num_classes=3, dtype="float32")}


@functools.cache
def in_parts(name):
    """(flow, variables, inputs, latents, what `eval_parts` gives)."""
    flow = WITH_PARTS[name]()
    variables = flow_laws.random_variables(flow, jnp.float32)
    x, condition = flow_laws.random_images(flow), Condition(jnp.array([0, 2, -1]))
    x = x.astype(jnp.float32)
    z, _ = jax.jit(functools.partial(flow.apply, method="forward"))(variables, x, *condition)
    found = jax.jit(functools.partial(likelihood.eval_parts, flow))(variables, x, condition)
    return flow, variables, (x, condition), z, found


@pytest.mark.parametrize("name", WITH_PARTS)
def test_parts_add_up(name):
    flow, variables, _, z, (bits, parts) = in_parts(name)
    assert len(parts) == 4  # the prior, the pixels and two blocks, or couplings
    assert_close(parts.sum(0), bits, rtol=1e-5)
    variance = likelihood.prior_variance(variables)
    assert_close(parts[0], likelihood.bits_per_dim(likelihood.prior_nll(z, variance), z), 1e-5)
    assert_close(parts[1], np.full(3, np.log2(flow.pixel_scale)))
    assert (np.abs(parts[2:]).max(1) > 1e-3).all() == (name != "volume preserving")


def test_parts_are_in_the_order_of_the_blocks():
    flow, variables, (x, condition), _, (_, parts) = in_parts("tarflow")
    tokens, _ = flow.pixels.forward(x)
    for part, block in zip(parts[2:], flow.bind(variables).blocks, strict=True):
        tokens, logdet, *_ = block.forward_blocks(tokens, condition)
        assert_close(part, likelihood.bits_per_dim(-logdet, tokens), rtol=1e-4)


def test_parts_are_in_the_order_of_the_couplings():
    """The first is made to leave all as it is."""
    flow, variables, inputs, *_ = in_parts("jet")
    net = variables["params"]["blocks_0"]["layers"]["net"]
    closed = jax.tree.map(lambda array: array.at[0].set(0.0), net["proj_out"])
    params = {"blocks_0": {"layers": {"net": net | {"proj_out": closed}}}}
    _, parts = jax.jit(functools.partial(likelihood.eval_parts, flow))(
        variables | {"params": params}, *inputs
    )
    assert np.abs(parts[2]).max() < 1e-6 < 1e-3 < np.abs(parts[3]).max()


def test_gradient_norm_is_of_the_whole_gradient():
    before, after, metrics = one_step("jet")
    step_taken = jax.tree.map(lambda a, b: (a - b) / 0.1, before.params, after.params)
    assert_close(metrics["gradient_norm"], optax.global_norm(step_taken), rtol=1e-4)
    assert metrics["learning_rate"] == np.float32(0.1)


def learned_prior_follows_the_latents(found) -> None:
    flow, (before, after, _) = FLOWS["volume preserving"](), found
    variables = {"params": before.params, **before.collections}
    x, condition = noisy(flow, before)
    z, _ = jax.jit(functools.partial(flow.apply, method="forward"))(variables, x, *condition)
    old = before.collections["prior"]["variance"]
    expected = 0.9 * old + 0.1 * (z**2).mean(0)
    assert jnp.abs(expected - old).max() > 0.01
    assert_close(after.collections["prior"]["variance"], expected, rtol=1e-5)


def test_learned_prior_follows_the_latents():
    learned_prior_follows_the_latents(one_step("volume preserving"))


def test_share_of_the_logdet_cap():
    """Far below one on random parameters; one where all sigmoids are."""
    flow, (before, _, metrics) = FLOWS["jet"](), one_step("jet")
    assert abs(metrics["logdet_cap_share"]) < 0.5
    assert "logdet_cap_share" not in one_step("volume preserving")[2]
    output = before.params["blocks_0"]["layers"]["net"]["proj_out"]
    open_gates = output | {"bias": output["bias"] + 9.0}
    net = before.params["blocks_0"]["layers"]["net"] | {"proj_out": open_gates}
    params = {"blocks_0": {"layers": {"net": net}}}
    _, aux = step.loss(flow, params, before.collections, *noisy(flow, before))
    assert 0.99 < aux["metrics"]["logdet_cap_share"] <= 1


def test_what_a_step_depends_on():
    """The clock and the labels; not where in its split an example is."""
    flow, (state, _, usual) = FLOWS["jet"](), one_step("jet")
    train_step = jax.jit(trainer(flow).train_step)
    assert train_step(state, BATCH)[1]["bpd"] == usual["bpd"]
    assert train_step(state, BATCH._replace(index=BATCH.index + 1))[1]["bpd"] == usual["bpd"]
    later = state.replace(step=state.step + 1)
    relabelled = BATCH._replace(label=(BATCH.label + 1) % 3)
    assert train_step(later, BATCH)[1]["bpd"] != usual["bpd"]
    assert train_step(state, relabelled)[1]["bpd"] != usual["bpd"]
