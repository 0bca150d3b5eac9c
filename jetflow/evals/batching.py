"""Images in batches of one size, and a program run on each, with its results on the host."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Num

from jetflow import hosts, rollcall, sharding
from jetflow.data.dataset import Dataset, eval_batches
from jetflow.sampling.ancestral import gather
from jetflow.types import NO_LABEL, Batch


@dataclasses.dataclass(frozen=True)
class Batching:
    """How images are divided: batches of `size` images over all devices of the mesh."""

    mesh: Mesh
    size: int = 128

    def of_data(self, dataset: Dataset) -> Iterator[Batch]:
        """This process's rows of each batch of a split."""
        rows = sharding.local_rows(self.mesh, self.size)
        return eval_batches(dataset, batch_size=self.size, rows=rows)

    def of_images(
        self, chunks: Iterable[Num[np.ndarray, "_ *X"]], num_classes: int = 0, start: int = 0
    ) -> Iterator[Batch]:
        """This process's rows of images that every process has, in chunks of at most a batch.

        Args:
            num_classes: labels take turns, image i has i % num_classes; 0 for none.
            start: the number of the first image.
        """
        rows = sharding.local_rows(self.mesh, self.size)
        for images in chunks:
            padding = self.size - len(images)
            index = np.pad(start + np.arange(len(images)), (0, padding), constant_values=-1)[rows]
            label = index % num_classes if num_classes else np.full(len(rows), NO_LABEL)
            start += len(images)
            images = np.pad(images, [(0, padding)] + [(0, 0)] * (images.ndim - 1))
            yield Batch(images[rows], label.astype(np.int32), index.astype(np.int32))

    def results(
        self,
        program: Callable[[Batch], Any],
        batches: Iterable[Batch],
        *,
        total: int,
        name: str,
        done: int = 0,
    ) -> Iterator[tuple[Any, Int[np.ndarray, "N"], Int[np.ndarray, "N"]]]:
        """Results, labels and indices of each batch, without its rows of padding.

        Args:
            program: a batch on the mesh -> a tree of arrays, each with the batch's rows first.
            total, done, name: of a progress bar: its images in all and so far, and what it is of.
        """
        with hosts.progress(total, name, "images", done) as bar:
            for batch in batches:
                rollcall.reach_barrier()
                placed = sharding.put_batch(batch, self.mesh, self.size)
                with sharding.on(self.mesh):
                    results = program(placed)
                results, label, index = gather((results, placed.label, placed.index))
                rollcall.reach()
                real = index >= 0
                yield jax.tree.map(lambda array, real=real: array[real], (results, label, index))
                bar.update(int(real.sum()))
