"""Likelihoods of images in bits per dimension, independent of batch size, mesh and order.

And Bayes' rule by them: the label under which an image is most likely.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jetflow import sharding
from jetflow.data.dataset import Dataset
from jetflow.evals import records
from jetflow.evals.batching import Batching
from jetflow.flows.stack import check_labels
from jetflow.likelihood import eval_parts, eval_step, importance_weighted
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.types import NO_LABEL, Batch, Condition, Flow

UNIFORM = Noise("uniform")


def bits_per_dim(
    flow: Flow,
    variables: Any,
    images: Num[Array, "B *X"],
    label: Int[Array, "B"] | None,
    key: Key[Array, ""],
    *,
    index: Int[Array, "B"] | None = None,
    noise: Noise | None = None,
) -> Float[Array, "B"]:
    """−log2 p per dimension of each image, under one draw of the noise.

    By default arrays get no noise and images uniform dequantisation, with which its mean is an
    upper bound on the bits per dimension of the discrete images. With gaussian noise it is the
    likelihood of noised data, which cannot be compared with that. A noise-conditional flow is told
    the level of a noise: give `Noise(t0=0.01)`, or `Noise("levels", t0=0.1, t1=0.1)`.

    Args:
        images: pixel values 0..255.
        label: None or -1 for none.
        key: of the draw; row i uses it with `index[i]`, by default i.

    Raises:
        UsageError: on a label that the flow does not have.
    """
    noise = noise or UNIFORM.of_data(flow.image_shape)
    index = jnp.arange(images.shape[0]) if index is None else index
    label = check_labels(flow, label, images.shape[0])
    return _bits_and_parts(flow, noise, variables, images, label, key, index)[0]


def lower(flow: Flow, variables: Any, batch: Batch, mesh: Mesh, noise: Noise = UNIFORM) -> Lowered:
    """The program of a `Density`, before it is compiled; for arrays, or their shapes alone."""
    label = batch.label if flow.num_classes else None
    key = key_for(0, 0, Purpose.EVALUATE)
    with sharding.on(mesh):
        return _bits_and_parts.lower(flow, noise, variables, batch.image, label, key, batch.index)


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_and_parts(flow, noise, variables, images, label, key, index):
    """Bits [B], and what each part of the flow contributes to them, [B, P]."""
    x, level = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)
    bits, parts = eval_parts(flow, variables, x, Condition(label, level))
    return bits, parts.T


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_by_label(flow, noise, variables, images, key, index):
    """Bits per dimension under every label, [B, Y]: one label at a time, for the whole batch."""
    x, level = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)

    def under(label):
        condition = Condition(jnp.full(len(x), label, jnp.int32), level)
        return eval_step(flow, variables, x, condition)

    return jax.lax.map(under, jnp.arange(flow.num_classes)).T


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _gradient_by_label(flow, noise, variables, images, key, index):
    """The gradient of log p by the logits of the classes, [B, Y], where all are equal."""
    x, level = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)

    def log_prob(logits):
        mixture = Condition(jax.nn.softmax(logits), level)
        return -eval_step(flow, variables, x, mixture).sum()

    return jax.grad(log_prob)(jnp.zeros((len(x), flow.num_classes)))


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """A likelihood with its uncertainty.

    Attributes:
        bits: per dimension, of each draw of the noise and each example.
        parts: what the prior, the preprocessing and each block contribute to their mean.
        noise, data: of which noise, and of which split.
        conditional: whether they are of images given their labels, p(x | y).
    """

    bits: Float[np.ndarray, "K N"]
    parts: Float[np.ndarray, "P"]
    noise: Noise
    data: Dataset
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

        nan for gaussian noise: the mean of p over it bounds nothing.
        """
        if self.noise.kind != "uniform":
            return math.nan
        return float(importance_weighted(self.bits, math.prod(self.data.image_shape)).mean())

    def record(self, *, step: int, weights: str) -> dict[str, Any]:
        """The record of it, see `records.record`."""
        prior, pixels, *blocks = map(records.finite, self.parts)
        facts: dict[str, Any] = {"draws": len(self.bits), "conditional": self.conditional}
        facts |= {"importance_weighted": records.finite(self.importance_weighted)}
        facts |= {"parts": {"prior": prior, "pixels": pixels, "blocks": blocks}}
        facts |= {"noise": noise_facts(self.noise)}
        facts |= {"data": self.data.facts(), "step": step, "weights": weights}
        return records.record(metric_name(self.noise), self.mean, self.standard_error, **facts)


@dataclasses.dataclass(frozen=True, eq=False)
class Density:
    """The density p of a flow, averaged over draws of a noise.

    Attributes:
        flow, variables: the flow.
        batching: how images are divided, which changes rounding errors alone.
        noise: uniform dequantisation, or the noise of training.
        seed, draws: draw d of example i depends on (seed, d, i) alone.
    """

    flow: Flow
    variables: Any
    batching: Batching
    noise: Noise = UNIFORM
    seed: int = 0
    draws: int = 1

    @property
    def keys(self) -> list[Key[Array, ""]]:
        """One a draw; without noise all draws were the same."""
        draws = 1 if self.noise.kind == "none" else self.draws
        return [key_for(self.seed, draw, Purpose.EVALUATE) for draw in range(draws)]

    def likelihood(self, dataset: Dataset, poll: Callable[[], None] = lambda: None) -> Likelihood:
        """Bits per dimension over a whole split, which is read once for all draws.

        Args:
            poll: called after each batch; may raise to stop.
        """
        keys = self.keys

        def program(batch: Batch) -> Any:
            label = batch.label if self.flow.num_classes else None
            return [
                _bits_and_parts(
                    self.flow, self.noise, self.variables, batch.image, label, key, batch.index
                )
                for key in keys
            ]

        bits, parts = np.full((len(keys), len(dataset)), np.nan), []
        for results, _, index in self.batching.results(
            program, self.batching.of_data(dataset), total=len(dataset), name="likelihood"
        ):
            bits[:, index] = [values for values, _ in results]
            parts += [shares.sum(0, dtype=np.float64) for _, shares in results]
            poll()
        conditional = bool(self.flow.num_classes and dataset.num_classes)
        return Likelihood(bits, np.sum(parts, axis=0) / bits.size, self.noise, dataset, conditional)

    def answers(self, batches: Iterable[Batch], total: int, *, by_gradient: bool) -> "Answers":
        """The label of each image by the density: Bayes' rule, or one gradient.

        By Bayes' rule, for equally frequent labels, it is argmax over y of p(x | y). With many
        classes a gradient is faster: that of log p(x | λ) by the logits λ of a mixture of the
        classes' embeddings, at λ = 0; its largest entry is the label's.

        Args:
            batches: this process's rows of each batch, with `total` images in all.
        """
        program = _gradient_by_label if by_gradient else _bits_by_label
        keys, found = self.keys, Answers(np.full(total, NO_LABEL), np.full(total, NO_LABEL))

        def run(batch: Batch) -> Any:
            arguments = (self.flow, self.noise, self.variables, batch.image)
            return [program(*arguments, key, batch.index) for key in keys]

        for results, label, index in self.batching.results(
            run, batches, total=total, name="accuracy"
        ):
            scores = np.stack(results)
            if by_gradient:
                bits = -scores.mean(0)
            else:
                bits = importance_weighted(scores, math.prod(self.flow.image_shape))
            finite = np.isfinite(bits).all(1)  # the least of nan would be the first label's
            found.answer[index] = np.where(finite, bits.argmin(1), NO_LABEL)
            found.label[index] = label
        return found


class Answers(NamedTuple):
    """The labels of images, and what a density takes them for: -1 where it is not finite."""

    label: Int[np.ndarray, "N"]
    answer: Int[np.ndarray, "N"]

    @property
    def right(self) -> Bool[np.ndarray, "N"]:
        return (self.label == self.answer) & (self.answer >= 0)


def noise_facts(noise: Noise) -> dict[str, Any]:
    """What is recorded of the noise of an evaluation."""
    facts: dict[str, Any] = {"kind": noise.kind, "std": noise.std}
    if noise.t0:  # what a noise-conditional flow is told
        facts |= {"t0": noise.t0, "t1": noise.t1, "distribution": noise.distribution}
    return facts


def metric_name(noise: Noise) -> str:
    """ "bpd" for dequantised images; that of arrays, and of noisy data, has a name of its own."""
    return {"uniform": "bpd", "none": "density_bpd"}.get(noise.kind, "noised_bpd")
