"""Held-out likelihood in bits per dimension, independent of batch size, mesh and order."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Float, Int, Key, UInt8

from jetflow import sharding
from jetflow.data.dataset import Dataset, eval_batches
from jetflow.evals import records
from jetflow.evals.batched import over_batches
from jetflow.flows.stack import check_labels
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
    return _bits_and_parts(flow, noise, variables, images, label, key, index)[0]


def lower(flow: Flow, variables: Any, batch: Batch, mesh: Mesh, noise: Noise = UNIFORM) -> Lowered:
    """The program of `measure`, before it is compiled; for arrays, or their shapes alone."""
    label = batch.label if flow.num_classes else None
    key = key_for(0, 0, Purpose.EVALUATE)
    with sharding.on(mesh):
        return _bits_and_parts.lower(flow, noise, variables, batch.image, label, key, batch.index)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_and_parts(flow, noise, variables, images, label, key, index):
    """Bits [B], and what each part of the flow contributes to them, [B, P]."""
    x = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)
    bits, parts = eval_parts(flow, variables, x, label)
    return bits, parts.T


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
    def mean(self) -> float:
        """Bits per dimension, over all examples and draws."""
        return float(self.bits.mean(1).mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over the noise draws; nan for a single draw."""
        if len(self.bits) == 1:
            return math.nan
        return float(np.std(self.bits.mean(1), ddof=1) / math.sqrt(len(self.bits)))

    @property
    def error_over_examples(self) -> float:
        """The standard error of the mean, with these examples as a sample of all there could be."""
        return float(np.std(self.bits.mean(0), ddof=1) / math.sqrt(self.bits.shape[1]))

    @property
    def importance_weighted(self) -> float:
        """The mean over examples of the bound that combines all draws of an example.

        Only for uniform noise: the mean of p over gaussian noise bounds nothing.
        """
        return float(importance_weighted(self.bits, self.dimensions).mean())


def measure(
    flow: Flow,
    variables: Any,
    dataset: Dataset,
    *,
    mesh: Mesh,
    noise: Noise = UNIFORM,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 128,
    poll: Callable[[], None] = lambda: None,
) -> Likelihood:
    """Bits per dimension over a whole split, which is read once for all draws.

    Args:
        noise: uniform dequantisation, or the noise of training.
        seed: draw d of example i depends on (seed, d, i) alone.
        batch_size: over all devices of the mesh.
        poll: called after each batch; may raise to stop.
    """
    keys = [key_for(seed, draw, Purpose.EVALUATE) for draw in range(draws)]

    def program(batch: Batch) -> Any:
        label = batch.label if flow.num_classes else None
        return [
            _bits_and_parts(flow, noise, variables, batch.image, label, key, batch.index)
            for key in keys
        ]

    rows = sharding.local_rows(mesh, batch_size)
    batches = eval_batches(dataset, batch_size=batch_size, rows=rows)
    bits, parts = np.full((draws, len(dataset)), np.nan), []
    for results, _, index in over_batches(
        program, batches, mesh=mesh, batch_size=batch_size, total=len(dataset), name="likelihood"
    ):
        bits[:, index] = [values for values, _ in results]
        parts += [shares.sum(0, dtype=np.float64) for _, shares in results]
        poll()
    return Likelihood(
        bits,
        np.sum(parts, axis=0) / bits.size,
        math.prod(dataset.image_shape),
        bool(flow.num_classes and dataset.num_classes),
    )


def metric_name(noise: Noise) -> str:
    """ "bpd" for dequantised images; data with gaussian noise has a likelihood of its own name."""
    return "bpd" if noise.kind == "uniform" else "noised_bpd"


def record(
    likelihood: Likelihood, noise: Noise, dataset: Dataset, *, step: int, weights: str
) -> dict[str, Any]:
    """The record of a likelihood, see `records.record`."""
    prior, pixels, *blocks = map(records.finite, likelihood.parts)
    bound = likelihood.importance_weighted if noise.kind == "uniform" else None
    return records.record(
        metric_name(noise),
        likelihood.mean,
        likelihood.standard_error,
        draws=len(likelihood.bits),
        importance_weighted=records.finite(bound),
        conditional=likelihood.conditional,
        parts={"prior": prior, "pixels": pixels, "blocks": blocks},
        noise={"kind": noise.kind, "std": noise.std},
        data=dataset.facts(),
        step=step,
        weights=weights,
    )
