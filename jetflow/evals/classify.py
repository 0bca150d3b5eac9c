"""Bayes' rule as a classifier: the label under which an image is most likely."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jetflow import sharding
from jetflow.data import dataset as pipeline
from jetflow.evals.records import number
from jetflow.likelihood import eval_step
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.types import Batch, Flow


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Attributes:
        value: the share.
        examples, draws: how many there are, and of the noise for each.
        not_finite: examples with a likelihood that is not; they count as wrong.
    """

    value: float
    examples: int
    draws: int
    not_finite: int

    @property
    def standard_error(self) -> float:
        """Over the examples, as binomial."""
        return math.sqrt(self.value * (1 - self.value) / self.examples)


def measure(
    flow: Flow,
    variables: Any,
    dataset: pipeline.Dataset,
    *,
    mesh: Mesh,
    noise: Noise,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 128,
) -> Accuracy:
    """The share of a split whose label is argmax over y of log p(x | y), averaged over draws.

    All labels see the same draws of the noise, which are those of `bpd.measure`. With equally
    frequent labels this is Bayes' rule.
    """
    rows = sharding.local_rows(mesh, batch_size)
    batches = pipeline.eval_batches(dataset, batch_size=batch_size, rows=rows)
    return measure_batches(
        flow, variables, batches, len(dataset), mesh=mesh, noise=noise, seed=seed, draws=draws,
        batch_size=batch_size,
    )  # fmt: skip


def measure_batches(
    flow: Flow,
    variables: Any,
    batches: Iterable[Batch],
    examples: int,
    *,
    mesh: Mesh,
    noise: Noise,
    seed: int,
    draws: int,
    batch_size: int,
) -> Accuracy:
    """The same of as many examples in batches, of which each process has its rows."""
    right = not_finite = 0
    for batch in batches:
        batch = sharding.put_batch(batch, mesh, batch_size)
        bits = jnp.zeros(())
        for draw in range(draws):
            key = key_for(seed, draw, Purpose.EVALUATE)
            with sharding.on(mesh):
                bits = bits + _bits_by_label(flow, noise, variables, batch.image, key, batch.index)
        finite = jnp.isfinite(bits).all(0)  # the least of nan would be the first label's
        told = jnp.stack([finite & (jnp.argmin(bits, axis=0) == batch.label), ~finite], axis=1)
        told = multihost_utils.process_allgather(told & (batch.index >= 0)[:, None], tiled=True)
        right += int(told[:, 0].sum())
        not_finite += int(told[:, 1].sum())
    return Accuracy(right / examples, examples, draws, not_finite)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_by_label(flow, noise, variables, images, key, index):
    """Bits per dimension under every label, [Y, B]: one label at a time, for the whole batch."""
    x = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)

    def under(label):
        return eval_step(flow, variables, x, jnp.full(len(x), label, jnp.int32))

    return jax.lax.map(under, jnp.arange(flow.num_classes))


def record(
    accuracy: Accuracy, noise: Noise, dataset: pipeline.Dataset, *, step: int, weights: str
) -> dict[str, Any]:
    """What is written of an accuracy: the value and everything that it depends on."""
    return {
        "metric": "accuracy",
        "value": accuracy.value,
        "standard_error": accuracy.standard_error,
        "draws": accuracy.draws,
        "not_finite": accuracy.not_finite,
        "noise": {"kind": noise.kind, "std": noise.std},
        "data": dataset.facts(),
        "step": step,
        "weights": weights,
    }


def describe(result: dict[str, Any]) -> str:
    """A `record` for a person."""
    data, noise = result["data"], result["noise"]
    return (
        f"accuracy {number(result)} (standard error over {data['examples']:,} examples of "
        f"{data['name']} {data['version']} {data['split']}, checksum {data['checksum']}), by the "
        f"likelihoods of images with {noise['kind']} noise, mean of {result['draws']} draws"
        f"{broken(result)}"
    )


def broken(result: dict[str, Any]) -> str:
    """What is to be said of likelihoods that are not finite, if there are any."""
    count = result["not_finite"]
    said = f"\n  ({count:,} have likelihoods that are not finite, and count as wrong)"
    return said if count else ""
