"""Held-out likelihood in bits per dimension, independent of batch size, mesh and order."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Float, Int, Key, UInt8

from jetflow import sharding
from jetflow.data import pipeline
from jetflow.flows.labels import check_labels
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.step import eval_step
from jetflow.types import Batch, Flow

UNIFORM = Noise("uniform")


def bits_per_dim(
    flow: Flow,
    variables: Any,
    images: UInt8[Array, "B H W C"],
    label: Int[Array, "B"] | None,
    key: Key[Array, ""],
    *,
    index: Int[Array, "B"] | None = None,
    noise: Noise = UNIFORM,
) -> Float[Array, "B"]:
    """−log2 p per dimension of each image, under one draw of the noise.

    With the default noise, uniform dequantisation, its mean is an upper bound on the bits per
    dimension of the discrete images. With gaussian noise it is the likelihood of noised data, which
    cannot be compared with that.

    Args:
        images: pixel values 0..255.
        label: None or -1 for none.
        key: of the draw; row i uses it with `index[i]`, by default i.

    Raises:
        UsageError: on a label that the flow does not have.
    """
    index = jnp.arange(images.shape[0]) if index is None else index
    label = check_labels(flow, label, images.shape[0])
    return _bits_per_dim(flow, noise, variables, images, label, key, index)


def lower(flow: Flow, variables: Any, batch: Batch, mesh: Mesh, noise: Noise = UNIFORM) -> Lowered:
    """The program of `measure`, before it is compiled; for arrays, or their shapes alone."""
    label = batch.label if flow.num_classes else None
    key = key_for(0, 0, Purpose.EVALUATE)
    with sharding.on(mesh):
        return _bits_per_dim.lower(flow, noise, variables, batch.image, label, key, batch.index)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_per_dim(flow, noise, variables, images, label, key, index):
    x = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)
    return eval_step(flow, variables, x, label)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A likelihood with its uncertainty.

    Attributes:
        mean: bits per dimension, over all examples and draws.
        standard_error: of that mean, over the noise draws; nan for a single draw.
        draws: how many.
    """

    mean: float
    standard_error: float
    draws: int


def measure(
    flow: Flow,
    variables: Any,
    dataset: pipeline.Dataset,
    *,
    mesh: Mesh,
    noise: Noise = UNIFORM,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 128,
    poll: Callable[[], None] = lambda: None,
) -> Likelihood:
    """Bits per dimension over a whole split, each example once a draw.

    Args:
        noise: uniform dequantisation, or the noise of training.
        seed: draw d of example i depends on (seed, d, i) alone.
        batch_size: over all devices of the mesh.
        poll: called after each batch; may raise to stop.
    """
    means = []
    for draw in range(draws):
        key = key_for(seed, draw, Purpose.EVALUATE)
        bits, seen = [], []
        for batch in pipeline.eval_batches(
            dataset,
            batch_size=batch_size,
            rows=sharding.local_rows(mesh, batch_size),
        ):
            batch = sharding.put_batch(batch, mesh, batch_size)
            label = batch.label if flow.num_classes else None
            with sharding.on(mesh):
                values = _bits_per_dim(flow, noise, variables, batch.image, label, key, batch.index)
            gathered = multihost_utils.process_allgather((values, batch.index), tiled=True)
            bits.append(gathered[0])
            seen.append(gathered[1])
            poll()
        real = np.concatenate(seen) >= 0
        means.append(np.concatenate(bits)[real].mean(dtype=np.float64))
    error = float(np.std(means, ddof=1) / np.sqrt(draws)) if draws > 1 else float("nan")
    return Likelihood(float(np.mean(means)), error, draws)


def metric_name(noise: Noise) -> str:
    """ "bpd" for dequantised images; data with gaussian noise has a likelihood of its own name."""
    return "bpd" if noise.kind == "uniform" else "noised_bpd"


def record(
    likelihood: Likelihood, noise: Noise, dataset: pipeline.Dataset, *, step: int, weights: str
) -> dict[str, Any]:
    """What is written of a likelihood: the value and everything that it depends on."""
    return {
        "metric": metric_name(noise),
        "value": _finite(likelihood.mean),
        "standard_error": _finite(likelihood.standard_error),
        "draws": likelihood.draws,
        "noise": {"kind": noise.kind, "std": noise.std},
        "data": dataset.facts(),
        "step": step,
        "weights": weights,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe(result: Mapping[str, Any]) -> str:
    """A `record` for a person."""
    data, draws = result["data"], result["draws"]
    value, error = result["value"], result["standard_error"]
    number = "not finite" if value is None else f"{value:.4f}"
    number += "" if error is None else f" ± {error:.2g}"
    over = f"standard error over {draws} noise draws" if draws > 1 else "1 noise draw"
    over += ", averaged weights" if result["weights"] == "ema" else ""
    text = (
        f"{result['metric']} {number} ({over}) on {data['name']} {data['version']} "
        f"{data['split']}: {data['examples']:,} examples, resize: {data['resize']}, "
        f"checksum {data['checksum']}"
    )
    if result["noise"]["kind"] == "uniform":
        return text
    return (
        f"{text}\n  (of data with gaussian noise of std {result['noise']['std']:g} added: not "
        "comparable with a bpd of dequantised images)"
    )
