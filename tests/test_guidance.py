"""Cached, guided sampling against an inverse that recomputes everything for every token.

The reference is numpy, one image at a time, from the equations: block by block,
x_i = z_i·σ_i + μ_i, by a rule from c, the prediction with the label, and u, that without it and
with attention logits divided by the temperature.
"""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jetflow.flows import autoregressive
from jetflow.types import Guidance

pytestmark = pytest.mark.usefixtures("float64")

CASES = {
    "none": (3, [0, 2, -1], None),
    "both": (3, [0, 2, -1], Guidance(1.5)),
    "a": (3, [0, 2, -1], Guidance(1.5, "a", temperature=1.3)),
    "b": (3, [0, 2, -1], Guidance(-0.7, "b")),
    "annealed": (3, [0, 2, 1], Guidance(1.5, "ab", temperature=0.6, annealed=True)),
    "scale": (3, [0, 2, 1], Guidance(6.0, rule="scale", annealed=True)),
    "scale of a": (3, [0, 2, -1], Guidance(1.5, "a", temperature=1.3, rule="scale")),
    "starflow": (3, [0, 2, 1], Guidance(2.0, rule="starflow")),
    "one block": (3, [0, 2, 1], Guidance(1.5, blocks=1)),
    "unconditional": (0, None, Guidance(0.8, "ab", temperature=1.5)),
}


def dense(layer, x):
    return np.tensordot(x, layer["kernel"], 1) + layer["bias"]


def normalise(layer, x):
    deviation = x - x.mean(-1, keepdims=True)
    variance = (deviation**2).mean(-1, keepdims=True)
    return deviation / np.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"]


def attention(layer, x, temperature, head_dim=4):
    qkv = dense(layer["qkv"], normalise(layer["norm_attention"], x))
    query, key, value = qkv.swapaxes(0, 1)
    mixed = []
    for start in range(0, x.shape[-1], head_dim):
        part = slice(start, start + head_dim)
        logits = query[:, part] @ key[:, part].T / np.sqrt(head_dim) / temperature
        weights = np.exp(np.where(np.tri(len(x)) > 0, logits, -np.inf))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    return dense(layer["out"], np.concatenate(mixed, -1))


def mlp(layer, x):
    hidden = dense(layer["mlp_in"], normalise(layer["norm_mlp"], x))
    return dense(layer["mlp_out"], hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))))


def predict(block, past, position, label, temperature):
    """(α, μ) of the token after those of the past."""
    hidden = dense(block["proj_in"], past) + position[: len(past)]
    if "class_embedding" in block:
        classes = block["class_embedding"]
        hidden = hidden + (classes.mean(0) if label in (None, -1) else classes[label])
    layers = block["transformer"]["layers"]
    for index in range(len(layers["qkv"]["bias"])):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        hidden = hidden + attention(layer, hidden, temperature)
        hidden = hidden + mlp(layer, hidden)
    return np.split(dense(block["proj_out"], hidden)[-1], 2)


def by_log_scale(log_c, shift_c, log_u, shift_u, g):
    return np.exp(log_c + g * (log_c - log_u)), shift_c + g * (shift_c - shift_u)


def by_scale(log_c, shift_c, log_u, shift_u, g):
    scale = np.exp(log_c) * (1 + g) - g * np.exp(log_u)
    return scale, shift_c + g * (shift_c - shift_u)


def by_starflow(log_c, shift_c, log_u, shift_u, g):
    s = np.minimum(np.exp(log_c) / np.exp(log_u), 1) ** 2
    d = 1 + g - g * s
    return np.exp(log_c) / np.sqrt(d), ((1 + g) * shift_c - g * s * shift_u) / d


RULES = {"log_scale": by_log_scale, "scale": by_scale, "starflow": by_starflow}


def invert_block(block, z, label, guidance, backward):
    position = block["position"]
    z, position = (z[::-1], position[::-1]) if backward else (z, position)
    x, logdet = z.copy(), 0.0
    for i in range(1, len(z)):
        log_scale, shift = predict(block, x[:i], position, label, 1.0)
        scale = np.exp(log_scale)
        if guidance is not None:
            unguided = predict(block, x[:i], position, None, guidance.temperature)
            g = guidance.scale * (i / (len(z) - 1) if guidance.annealed else 1.0)
            scale, new_shift = RULES[guidance.rule](log_scale, shift, *unguided, g)
            shift = new_shift if "b" in guidance.what else shift
            scale = scale if "a" in guidance.what else np.exp(log_scale)
        x[i] = z[i] * scale + shift
        logdet += np.log(np.abs(scale)).sum()
    return (x[::-1] if backward else x), logdet


def reference(flow, params, z, label, guidance):
    logdet = np.log(128) * z.size
    for index in reversed(range(len(flow.blocks))):
        guided = guidance and index >= len(flow.blocks) - (guidance.blocks or len(flow.blocks))
        guiding = guidance if guided else None
        z, more = invert_block(params[f"blocks_{index}"], z, label, guiding, index % 2 == 1)
        logdet += more
    rows, columns = flow.pixels.grid
    x = z.reshape(rows, columns, -1, 2, 2).transpose(0, 3, 1, 4, 2).reshape(flow.image_shape)
    return (x + 1) * 128, logdet


@functools.cache
def setting(num_classes: int):
    flow = flow_laws.tarflow((4, 4, 3), num_classes, layers_per_block=(2, 1))
    variables = flow_laws.random_variables(flow)
    return flow, variables, np.random.default_rng(1).standard_normal((3, 4, 12))


@functools.cache
def expected(name: str):
    num_classes, labels, guidance = CASES[name]
    flow, variables, z = setting(num_classes)
    params = jax.tree.map(np.asarray, variables["params"])
    rows = [
        reference(flow, params, one, label, guidance)
        for one, label in zip(z, labels or [None] * 3, strict=True)
    ]
    return [np.stack(column) for column in zip(*rows, strict=True)]


def samples_are_those_of_the_reference(name: str) -> None:
    num_classes, labels, guidance = CASES[name]
    flow, variables, z = setting(num_classes)
    inverse = jax.jit(functools.partial(flow.apply, method="inverse"))
    label = None if labels is None else jnp.array(labels)
    x, logdet = inverse(variables, jnp.asarray(z), label, guidance)
    np.testing.assert_allclose(x, expected(name)[0], rtol=0, atol=1e-8)
    np.testing.assert_allclose(logdet, expected(name)[1], rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_the_reference(name):
    samples_are_those_of_the_reference(name)


@pytest.mark.usefixtures("fresh_traces")
def test_the_cache_grows_as_it_is_filled(monkeypatch):
    """One token in the first stage, and one in the next."""
    monkeypatch.setattr(autoregressive, "STAGE", 1)
    stages = [(slice(0, 1), 1), (slice(1, 2), 2), (slice(2, 3), 3)]
    assert autoregressive._stages(4, window=1) == stages
    samples_are_those_of_the_reference("annealed")
    real = autoregressive.enlarged
    emptied = lambda *args: jax.tree.map(jnp.zeros_like, real(*args))  # noqa: E731
    monkeypatch.setattr(autoregressive, "enlarged", emptied)
    with pytest.raises(AssertionError):
        samples_are_those_of_the_reference("annealed")
