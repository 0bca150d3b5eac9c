"""Held-out likelihood in bits per dimension, independent of batch size, mesh and order."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from jetflow.flows.stack import Stack
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.step import eval_step
from jetflow.types import Batch

UNIFORM = Noise("uniform")


def bits_per_dim(
    flow: Stack,
    variables,
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
    """
    index = jnp.arange(images.shape[0]) if index is None else index
    return _bits_per_dim(flow, noise, variables, images, label, keys_by_example(key, index))


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_per_dim(flow, noise, variables, images, label, keys):
    x = noise.add_by_example(images, keys, flow.pixels.scale)
    return eval_step(flow, variables, x, label)


@dataclasses.dataclass(frozen=True)
class Result:
    """A likelihood with its uncertainty.

    Attributes:
        mean: bits per dimension, over the examples and draws.
        standard_error: of the mean with respect to the noise draws; nan for a single draw.
        examples, draws: how many of each.
    """

    mean: float
    standard_error: float
    examples: int
    draws: int


def evaluate(
    flow: Stack,
    variables,
    batches: Callable[[], Iterable[Batch]],
    *,
    noise: Noise = UNIFORM,
    seed: int = 0,
    draws: int = 1,
    put: Callable[[Batch], Any] = lambda batch: batch,
    poll: Callable[[], None] = lambda: None,
) -> Result:
    """Bits per dimension over a whole split.

    Args:
        batches: makes a pass over the split, each example once; rows with index -1 are padding.
        noise: uniform dequantisation, or the noise of training.
        seed: of the draws; draw d of example i depends on (seed, d, i) alone.
        put: places a batch on the devices.
        poll: called between batches; may raise to stop.
    """
    means = []
    for draw in range(draws):
        key = key_for(seed, draw, Purpose.EVALUATE)
        total, count = 0.0, 0
        for batch in batches():
            placed = put(batch)
            label = placed.label if flow.num_classes else None
            bits = bits_per_dim(
                flow, variables, placed.image, label, key, index=placed.index, noise=noise
            )
            part, rows = _masked_sum(bits, placed.index)
            total, count = total + float(part), count + int(rows)
            poll()
        means.append(total / count)
    error = float(np.std(means, ddof=1) / np.sqrt(draws)) if draws > 1 else float("nan")
    return Result(float(np.mean(means)), error, count, draws)
