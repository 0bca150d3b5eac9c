"""A program run on every batch of a set of images, its results on the host of each process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from tqdm import tqdm

from jetflow import hosts, sharding
from jetflow.sampling.ancestral import gather
from jetflow.types import Batch


def over_batches(
    program: Callable[[Batch], Any],
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
    batch_size: int,
    total: int,
    name: str,
    done: int = 0,
) -> Iterator[tuple[Any, Int[np.ndarray, "N"], Int[np.ndarray, "N"]]]:
    """Results, labels and indices of each batch, without its rows of padding.

    Args:
        program: a global batch on the mesh -> a tree of arrays, each with the batch's rows first.
        batches: this process's rows of each batch, see `sharding.local_rows`.
        batch_size: over all devices of the mesh.
        total, done, name: of a progress bar: its images in all and so far, and what it is of.
    """
    hidden = None if hosts.is_first() else True  # None: hidden unless standard error is a terminal
    with tqdm(
        total=total, initial=done, unit=" images", desc=name, disable=hidden, leave=False
    ) as bar:
        for batch in batches:
            placed = sharding.put_batch(batch, mesh, batch_size)
            with sharding.on(mesh):
                results = program(placed)
            results, label, index = gather((results, placed.label, placed.index))
            real = index >= 0
            yield jax.tree.map(lambda array, real=real: array[real], (results, label, index))
            bar.update(int(real.sum()))
