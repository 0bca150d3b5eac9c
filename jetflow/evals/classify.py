"""Bayes' rule as a classifier: the label under which an image is most likely."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jetflow.evals.batched import over_batches
from jetflow.likelihood import eval_step, importance_weighted
from jetflow.noise import Noise, Purpose, key_for, keys_by_example
from jetflow.types import Batch, Flow


def answers(
    flow: Flow,
    variables: Any,
    batches: Iterable[Batch],
    examples: int,
    *,
    mesh: Mesh,
    noise: Noise,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 128,
) -> Float[np.ndarray, "N"]:
    """1 for each image whose label is argmax over y of p(x | y), else 0; nan if p is not finite.

    p is averaged over draws of the noise, those of `likelihoods.measure`, the same for all labels.
    With equally frequent labels this is Bayes' rule.

    Args:
        batches: this process's rows of each batch, with `examples` images in all.
    """
    keys = [key_for(seed, draw, Purpose.EVALUATE) for draw in range(draws)]

    def program(batch: Batch) -> Any:
        return [
            _bits_by_label(flow, noise, variables, batch.image, key, batch.index) for key in keys
        ]

    right = np.full(examples, np.nan)
    for results, label, index in over_batches(
        program, batches, mesh=mesh, batch_size=batch_size, total=examples, name="accuracy"
    ):
        bits = importance_weighted(np.stack(results), math.prod(flow.image_shape))
        finite = np.isfinite(bits).all(1)  # the least of nan would be the first label's
        right[index] = np.where(finite, bits.argmin(1) == label, np.nan)
    return right


@functools.partial(jax.jit, static_argnames=("flow", "noise"))
def _bits_by_label(flow, noise, variables, images, key, index):
    """Bits per dimension under every label, [B, Y]: one label at a time, for the whole batch."""
    x = noise.add_by_example(images, keys_by_example(key, index), flow.pixel_scale)

    def under(label):
        return eval_step(flow, variables, x, jnp.full(len(x), label, jnp.int32))

    return jax.lax.map(under, jnp.arange(flow.num_classes)).T
