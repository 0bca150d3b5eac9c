"""Noise-conditional flows: the published iTARFlow's figures, denoising, and what uses the level."""

import functools
import math

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from published import ITARFLOW, Case, assert_equal, case, golden, tarflow_arguments, to_nhwc
from test_parity import (
    LATENT,
    SAMPLE,
    TRAINING,
    assert_close,
    assert_same_logdet,
    blocks_forward,
)

from jetflow import load_model, optim, train
from jetflow.noise import Noise
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.denoise import Denoising, denoised_along
from jetflow.tools import convert
from jetflow.training.step import Trainer, TrainState
from jetflow.types import Batch, Condition, Guidance, UsageError


@pytest.fixture(scope="module")
def found() -> Case:
    return case(ITARFLOW)


# The published figures.


def test_forward(found):
    level = jnp.asarray(found.arrays["t"])
    outputs, logdet = blocks_forward(found, found.label, level)
    assert_same_logdet(logdet, found.arrays["logdet_mean_per_example"] * found.size)
    for index, output in enumerate(outputs):
        assert_close(output, found.arrays[f"block_output_{index}"], LATENT)
    run = jax.jit(functools.partial(found.flow.apply, method="forward"))
    z, whole = run(found.variables, found.pixels(found.arrays["x"]), found.label, level)
    assert_close(z, found.arrays["z"], LATENT)
    assert_same_logdet(whole, logdet - found.size * math.log(127.5))


RULES = {"tarflow": "scale", "starflow": "starflow"}  # as they are called there and here


@pytest.mark.parametrize("index", range(4))
def test_sample(found, index):
    given, guidance = found.settings["guided"][index], None
    if given["guidance"]:
        guidance = Guidance(
            given["guidance"], annealed=given["annealed"], rule=RULES[given["rule"]],
            blocks=given["guide_flows"],
        )  # fmt: skip
    sampler = Sampler(found.flow, found.variables, guidance, noise_level=found.settings["t1"])
    x = sampler.decode(jnp.asarray(found.arrays["noise"]), found.label).pixels / 127.5 - 1
    expected = to_nhwc(found.arrays[f"sample_{index}"])
    np.testing.assert_allclose(x, expected, rtol=0, atol=SAMPLE)
    if index:
        assert np.abs(expected - to_nhwc(found.arrays["sample_0"])).max() > 100 * SAMPLE


@pytest.mark.parametrize("clip", [True, False])
def test_denoised(found, clip):
    """From the prior's noise to the clean image, as one sampler."""
    levels = tuple(map(float, found.arrays["denoise_ts"]))
    denoise = Denoising(levels, clip)
    sampler = Sampler(found.flow, found.variables, denoise=denoise, noise_level=levels[0])
    x = sampler.decode(jnp.asarray(found.arrays["noise"]), found.label).pixels / 127.5 - 1
    expected = to_nhwc(found.arrays["denoised" if clip else "denoised_unclipped"])
    np.testing.assert_allclose(x, expected, rtol=0, atol=SAMPLE)


def test_training(found):
    """Losses are compared without the constants by which a density over pixels differs."""
    recipe, arrays = found.settings["train"], found.arrays
    tx, schedule = optim.adam(
        total_steps=100, lr=recipe["lr"], min_lr=recipe["lr"], warmup=0.0, b1=recipe["betas"][0],
        b2=recipe["betas"][1], eps=1e-8, weight_decay=recipe["weight_decay"], decay_rule="lr",
        clip_norm=0.0, mu_dtype="float32",
    )  # fmt: skip
    noise = Noise("levels", t0=found.settings["t0"], t1=found.settings["t1"], weight="t")
    update = jax.jit(Trainer(found.flow, tx, schedule, noise, seed=0).update)
    params = found.variables["params"]
    state, losses, norms = TrainState(jnp.int32(0), params, {}, tx.init(params), None), [], []
    constant = math.log(127.5) + 0.5 * math.log(2 * math.pi)
    steps = zip(
        *(arrays[f"train_{name}"] for name in ("images", "eps", "t", "labels")), strict=True
    )
    for images, eps, t, label in steps:
        x = found.pixels(images + t[:, None, None, None] * eps)
        state, metrics = update(state, x, Condition(jnp.asarray(label, jnp.int32), jnp.asarray(t)))
        losses.append(float(metrics["objective"]) * math.log(2) - t.mean() * constant)
        norms.append(float(metrics["gradient_norm"]) * math.log(2))
    np.testing.assert_allclose(losses, arrays["train_losses"], rtol=TRAINING)
    np.testing.assert_allclose(norms, arrays["train_grad_norms"], rtol=TRAINING)
    kernel = np.asarray(state.params["blocks_0"]["proj_in"]["kernel"])
    assert_close(kernel.T, arrays["train_final_proj_in_0"], TRAINING)


def test_there_and_back(found, tmp_path):
    convert.to_tarflow(tmp_path / "back.pth", found.flow, found.variables)
    again = convert.itarflow(tmp_path / "back.pth", **tarflow_arguments(found.settings))
    assert_equal(again[1], found.variables)
    with pytest.raises(UsageError, match="convert itarflow"):
        convert.tarflow(golden(ITARFLOW, ".pth"), **tarflow_arguments(found.settings))


# Denoising.


@functools.cache
def small(**fields):
    flow = flow_laws.tarflow(num_classes=3, num_blocks=2, dtype="float32", **fields)
    return flow, flow_laws.random_variables(flow, jnp.float32)


def denoised(levels, keys=None, eta=0.0):
    flow, variables = small(noise_conditional=True)
    x, label = flow_laws.random_images(flow).astype(jnp.float32), jnp.array([0, 2, -1])
    run = jax.jit(functools.partial(denoised_along, flow, clip=False))
    return np.asarray(run(variables, x, label, jnp.array(levels), keys, eta=eta))


def test_new_noise_comes_in_at_each_step_but_the_last():
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    plain, none = denoised([0.3, 0.1]), denoised([0.3, 0.1], keys, 0.0)
    np.testing.assert_allclose(none, plain, rtol=1e-4, atol=1e-3)
    some, all_of_it = (denoised([0.3, 0.1], keys, eta) for eta in (0.5, 1.0))
    assert np.abs(some - plain).max() > 1 < np.abs(all_of_it - some).max()
    np.testing.assert_allclose(denoised([0.3], keys, 1.0), denoised([0.3]), atol=1e-3)
    others = denoised([0.3, 0.1], keys[::-1], 1.0)
    assert np.abs(others[1] - all_of_it[1]).max() == 0 < np.abs(others[0] - all_of_it[0]).max()


def test_denoised_image_depends_on_its_number_alone():
    flow, variables = small(noise_conditional=True)
    denoise = Denoising((0.3, 0.1, 0.01), eta=1.0)
    sampler = Sampler(flow, variables, denoise=denoise, noise_level=0.3)
    key, label = jax.random.key(5), np.array([0, 1, 2])
    whole = sampler.draw(key, np.arange(3), label).pixels
    alone = sampler.draw(key, np.array([2]), label[2:]).pixels
    np.testing.assert_allclose(alone[0], whole[2], rtol=1e-3, atol=0.05)
    with pytest.raises(UsageError, match="denoise_eta"):
        sampler.decode(np.zeros((1, *flow.latent_shape)), label[:1])


@pytest.mark.parametrize(
    ("noise_conditional", "denoise", "message"),
    [
        (False, Denoising((0.3, 0.1)), "denoise_steps is 2, but this flow knows one level"),
        (True, Denoising((0.1, 0.3)), "expected falling levels"),
        (True, Denoising((0.3,), eta=1.5), "denoise_eta is 1.5; expected 0 to 1"),
    ],
)
def test_refused(noise_conditional, denoise, message):
    flow, variables = small(noise_conditional=noise_conditional)
    with pytest.raises(UsageError, match=message):
        Sampler(flow, variables, denoise=denoise, noise_level=0.3)


@pytest.mark.parametrize("noise_conditional", [False, True])
def test_level_of_the_wrong_kind_of_flow(noise_conditional):
    flow, variables = small(noise_conditional=noise_conditional)
    conditions = [] if noise_conditional else [None, 0.1]
    verb = "needs" if noise_conditional else "takes no"
    with pytest.raises(UsageError, match=f"this flow {verb} noise_level"):
        flow.apply(variables, jnp.zeros((1, 4, 4, 1)), *conditions)


# A run.


@pytest.fixture(scope="module", params=["tarflow", "jet"])
def run(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("levels") / request.param
    config = tiny_runs.config(request.param)
    config.flow.noise_conditional = True
    config.noise.update(kind="levels", std=0.0, t0=0.02, t1=0.2)
    config.eval.update(denoise=True, denoise_steps=3)
    train(config, workdir)
    return load_model(workdir)


def test_run(run):
    """Likelihoods are of named levels, and samples are denoised."""
    at_levels = run.evaluate(["noised_bpd"], levels=(0.02, 0.2), batch_size=8)
    assert [result["noise"]["t0"] for result in at_levels] == [0.02, 0.2]
    assert at_levels[0]["value"] < at_levels[1]["value"]  # less noise, fewer bits
    names = {path.name for path in (run.workdir / "evals").iterdir()}
    assert len([name for name in names if "level=0.02" in name or "level=0.2" in name]) == 2
    (over_all,) = run.evaluate(["noised_bpd"], batch_size=8)
    assert at_levels[0]["value"] < over_all["value"] < at_levels[1]["value"]
    (plain,) = run.evaluate(["bpd"], batch_size=8)
    assert plain["noise"]["kind"] == "uniform" and plain["noise"]["t0"] == 0.02
    images = run.sample(2, defaults="run")
    assert (images != run.sample(2)).any() and (images != run.sample(2, denoise=True)).any()
    assert (run.sample(2, noise_level=0.1) != run.sample(2)).any()
    z, _ = run.encode(images)
    assert np.abs(run.decode(z).astype(int) - images).max() <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"denoise": True, "denoise_std": 0.1}, "set noise_level instead"),
        ({"denoise_steps": 3}, "denoise_steps is 3 without denoise"),
    ],
)
def test_refused_option(run, fields, message):
    with pytest.raises(UsageError, match=message):
        run.sample(2, **fields)


def test_levels_without_effect_are_refused(run):
    with pytest.raises(UsageError, match="on which bpd does not depend; add noised_bpd"):
        run.evaluate(["bpd"], levels=(0.1,))


# Deep-shallow stacks.


def compiled_step(layers: tuple[int, ...]):
    """The training step of four blocks with so many layers, compiled."""
    flow = flow_laws.tarflow((8, 8, 1), num_blocks=4, layers_per_block=layers, width=32,
                             noise_conditional=True, dtype="float32", remat="full")  # fmt: skip
    tx = optax.sgd(1e-3)
    trainer = Trainer(flow, tx, lambda step: 1e-3, Noise("levels", t0=0.1, t1=0.3), seed=0)
    state = jax.eval_shape(trainer.first_state)
    image = jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.uint8)
    number = jax.ShapeDtypeStruct((64,), jnp.int32)
    return jax.jit(trainer.train_step).lower(state, Batch(image, number, number)).compile()


def test_blocks_of_different_depth_cost_what_their_layers_do():
    """As many layers in all: a program of the same size, with the same memory."""
    equal, unequal = (compiled_step(layers) for layers in ((4, 4, 4, 4), (2, 2, 2, 10)))
    sizes = [program.as_text().count("\n") for program in (equal, unequal)]
    memory = [program.memory_analysis().temp_size_in_bytes for program in (equal, unequal)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)
    assert memory[1] == pytest.approx(memory[0], rel=0.2)
