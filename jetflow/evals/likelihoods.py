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
from jetflow.data import dataset as pipeline
from jetflow.evals.records import finite, number
from jetflow.flows.labels import check_labels
from jetflow.likelihood import eval_parts, importance_weighted
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
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
    return _bits_per_dim(flow, noise, variables, images, label, key, index)[0]


def lower(flow: Flow, variables: Any, batch: Batch, mesh: Mesh, noise: Noise = UNIFORM) -> Lowered:
    """The program of `measure`, before it is compiled; for arrays, or their shapes alone."""
    label = batch.label if flow.num_classes else None
    key = key_for(0, 0, Purpose.EVALUATE)
    with sharding.on(mesh):
        return _bits_per_dim.lower(flow, noise, variables, batch.image, label, key, batch.index)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_per_dim(flow, noise, variables, images, label, key, index):
    """Bits [B], and what each part of the flow contributes to them, [P, B]."""
    x = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)
    return eval_parts(flow, variables, x, label)


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """A likelihood with its uncertainty.

    Attributes:
        bits: per dimension, of each draw of the noise and each example.
        parts: what the prior, the preprocessing and each block contribute to their mean.
        dimensions: of an example.
        conditional: whether they are of images given their labels, p(x | y).
    """

    bits: Float[np.ndarray, "K N"]
    parts: Float[np.ndarray, "P"]
    dimensions: int
    conditional: bool

    @property
    def draws(self) -> int:
        return len(self.bits)

    @property
    def mean(self) -> float:
        """Bits per dimension, over all examples and draws."""
        return float(self.bits.mean(1).mean())

    @property
    def standard_error(self) -> float:
        """Of that mean, over the noise draws; nan for a single draw."""
        if self.draws == 1:
            return float("nan")
        return float(np.std(self.bits.mean(1), ddof=1) / np.sqrt(self.draws))

    @property
    def error_over_examples(self) -> float:
        """The standard error of the mean as one over examples, of which these are a sample."""
        return float(np.std(self.bits.mean(0), ddof=1) / np.sqrt(self.bits.shape[1]))

    @property
    def importance_weighted(self) -> float:
        """The bound that has all draws of an example in it, over all examples.

        One for uniform noise alone: the mean of p over gaussian noise bounds nothing.
        """
        return float(importance_weighted(self.bits, self.dimensions).mean())


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
    all_bits, parts = [], []
    for draw in range(draws):
        key = key_for(seed, draw, Purpose.EVALUATE)
        bits = np.full(len(dataset), np.nan)
        for batch in pipeline.eval_batches(
            dataset,
            batch_size=batch_size,
            rows=sharding.local_rows(mesh, batch_size),
        ):
            batch = sharding.put_batch(batch, mesh, batch_size)
            label = batch.label if flow.num_classes else None
            with sharding.on(mesh):
                values = _bits_per_dim(flow, noise, variables, batch.image, label, key, batch.index)
            (values, shares), index = multihost_utils.process_allgather(
                (values, batch.index), tiled=True
            )
            real = index >= 0
            bits[index[real]] = values[real]
            parts.append(shares[:, real].sum(1, dtype=np.float64))
            poll()
        all_bits.append(bits)
    mean_parts = np.sum(parts, axis=0) / (draws * len(dataset))
    conditional = bool(flow.num_classes and dataset.num_classes)
    dimensions = math.prod(dataset.image_shape)
    return Likelihood(np.stack(all_bits), mean_parts, dimensions, conditional)


def metric_name(noise: Noise) -> str:
    """ "bpd" for dequantised images; data with gaussian noise has a likelihood of its own name."""
    return "bpd" if noise.kind == "uniform" else "noised_bpd"


def record(
    likelihood: Likelihood, noise: Noise, dataset: pipeline.Dataset, *, step: int, weights: str
) -> dict[str, Any]:
    """What is written of a likelihood: the value and everything that it depends on."""
    is_bound = noise.kind == "uniform"
    return {
        "metric": metric_name(noise),
        "value": finite(likelihood.mean),
        "standard_error": finite(likelihood.standard_error),
        "draws": likelihood.draws,
        "importance_weighted": finite(likelihood.importance_weighted) if is_bound else None,
        "conditional": likelihood.conditional,
        "parts": {
            "prior": finite(likelihood.parts[0]),
            "pixels": finite(likelihood.parts[1]),
            "blocks": [finite(part) for part in likelihood.parts[2:]],
        },
        "noise": {"kind": noise.kind, "std": noise.std},
        "data": dataset.facts(),
        "step": step,
        "weights": weights,
    }


def describe(result: Mapping[str, Any]) -> str:
    """A `record` for a person."""
    data, draws = result["data"], result["draws"]
    over = f"standard error over {draws} noise draws" if draws > 1 else "1 noise draw"
    over += ", averaged weights" if result["weights"] == "ema" else ""
    over += ", given the labels" if result["conditional"] else ""
    text = (
        f"{result['metric']} {number(result)} ({over}) on {data['name']} {data['version']} "
        f"{data['split']}: {data['examples']:,} examples, resize: {data['resize']}, "
        f"checksum {data['checksum']}"
    )
    if result["noise"]["kind"] == "uniform":
        return text
    return (
        f"{text}\n  (of data with gaussian noise of std {result['noise']['std']:g} added: not "
        "comparable with a bpd of dequantised images)"
    )
