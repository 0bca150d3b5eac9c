"""Features of images: computed on the mesh, and what is kept of them on the host of each process.

All in float64, in memory that does not grow with the number of images.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from jetflow import hosts, sharding
from jetflow.evals import inception
from jetflow.evals.batched import over_batches
from jetflow.evals.distances import Gaussian
from jetflow.files import if_possible, write_atomically
from jetflow.types import NO_LABEL, Batch, UsageError

SIZES = {"pooled": 2048, "spatial": 17 * 17 * 7}  # features of the FID, and of the sFID
SAVED_EVERY = 5000  # images


class Statistics:
    """The moments of the features of `total` images, and the features of `keep` of them.

    The same on all processes, each of which sees all features.

    Attributes:
        arrays: all that was added; "features" [K, P] are those kept, by the numbers of the images.
    """

    def __init__(self, total: int, keep: int):
        # At random, as images may come class by class; by a fixed seed, so that all agree.
        chosen = np.sort(np.random.default_rng(0).permutation(total)[:keep])
        self._slot = np.full(total, -1)
        self._slot[chosen] = np.arange(len(chosen))
        self.arrays: dict[str, Any] = {
            name: np.zeros(1, np.int64) for name in ("done", "not_finite")
        }
        self.arrays["features"] = np.zeros((len(chosen), SIZES["pooled"]), np.float32)
        for name, size in SIZES.items():
            self.arrays[f"{name}_sum"] = np.zeros(size)
            self.arrays[f"{name}_outer"] = np.zeros((size, size))

    @property
    def done(self) -> int:
        """The number of images that were added."""
        return int(self.arrays["done"][0])

    def add(
        self,
        index: Int[np.ndarray, "N"],
        pooled: Float[np.ndarray, "N P"],
        spatial: Float[np.ndarray, "N S"],
    ) -> None:
        """The features of the images of these numbers."""
        for name, rows in (("pooled", pooled), ("spatial", spatial)):
            rows = rows.astype(np.float64)
            self.arrays[f"{name}_sum"] += rows.sum(0)
            self.arrays[f"{name}_outer"] += rows.T @ rows
        slot = self._slot[index]
        self.arrays["features"][slot[slot >= 0]] = pooled[slot >= 0]
        self.arrays["done"] += len(index)

    def gaussian(self, name: str) -> Gaussian:
        """Mean and covariance of "pooled" or "spatial", with N − 1; zero for a single image."""
        mean = self.arrays[f"{name}_sum"] / self.done
        scatter = self.arrays[f"{name}_outer"] - self.done * np.outer(mean, mean)
        return Gaussian(mean, scatter / max(self.done - 1, 1))

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write all that was added, on the first process; `settings` is what it depends on."""
        if hosts.is_first():
            with if_possible("what a kill would cost"), write_atomically(path) as file:
                np.savez(file, settings=np.array(json.dumps(settings)), **self.arrays)

    def resume(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Go on from what `save` wrote with the same settings, if the first process finds it."""
        if hosts.is_first() and path.exists():
            try:
                with np.load(path, allow_pickle=False) as file:
                    if json.loads(str(file["settings"])) == json.loads(json.dumps(settings)):
                        self.arrays = {name: file[name] for name in self.arrays}
            except (
                OSError,
                EOFError,
                KeyError,
                ValueError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                logging.warning("%s is damaged (%s): all samples are drawn again", path, error)
        if jax.process_count() > 1:
            self.arrays = {name: _agreed(array) for name, array in self.arrays.items()}


def _agreed(array: np.ndarray) -> np.ndarray:
    """The first process's array. Its bits travel as integers: JAX would round float64."""
    bits = multihost_utils.broadcast_one_to_all(array.view(np.uint32))
    return np.array(bits).view(array.dtype)


def collect(
    network: inception.Network,
    batches: Iterable[Batch],
    statistics: Statistics,
    *,
    mesh: Mesh,
    batch_size: int,
    total: int,
    name: str,
    save: Callable[[], None] = lambda: None,
) -> Statistics:
    """The statistics, with the features of the images in these batches added.

    Args:
        batches: as for `over_batches`, and so are batch_size, total and name.
        save: called after each `SAVED_EVERY` images.
    """
    arrays = jax.device_put(network.arrays, sharding.replicated(mesh))
    saved = statistics.done
    for (pooled, spatial), _, index in over_batches(
        lambda batch: _features(arrays, batch.image),
        batches, mesh=mesh, batch_size=batch_size, total=total, name=name, done=saved,
    ):  # fmt: skip
        statistics.add(index, pooled, spatial)
        if statistics.done - saved >= SAVED_EVERY:
            saved = statistics.done
            save()
    return statistics


@jax.jit
def _features(arrays, images):
    outputs = inception.activations(arrays, images)
    return outputs["2048"], outputs["spatial"].reshape(len(images), -1)


def in_batches(
    chunks: Iterable[UInt8[np.ndarray, "_ H W C"]],
    *,
    batch_size: int,
    rows: Int[np.ndarray, "R"],
    num_classes: int = 0,
    start: int = 0,
) -> Iterator[Batch]:
    """Images that every process has, in chunks of at most a batch, as this process's rows.

    Args:
        num_classes: labels take turns, image i has i % num_classes; 0 for none.
        start: the number of the first image.
    """
    for images in chunks:
        padding = batch_size - len(images)
        index = np.pad(start + np.arange(len(images)), (0, padding), constant_values=-1)[rows]
        label = index % num_classes if num_classes else np.full(len(rows), NO_LABEL)
        start += len(images)
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        yield Batch(images[rows], label.astype(np.int32), index.astype(np.int32))


def images_of(path: Path, field: str, chunk: int) -> tuple[int, Iterator[np.ndarray]]:
    """How many images an .npz has, and the images, so many at a time.

    Its array "images", or ADM's "arr_0", is uint8 [N, H, W, C], with 1 or 3 channels. It is
    read as it is needed, and never as a whole.

    Args:
        field: the option that names the file, for messages.

    Raises:
        UsageError: if there are no such images.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = {"images.npy", "arr_0.npy"} & set(archive.namelist())
        if len(names) != 1:
            raise ValueError("it has neither images nor arr_0")
        file = archive.open(names.pop())
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{field} {path} cannot be read ({error}); expected an .npz with images, as "
            "`jetflow sample --npz` writes it"
        ) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0] or is_fortran:
        raise UsageError(
            f"{field} {path} holds {dtype} {list(shape)}; expected uint8 [N, H, W, 1 or 3]"
        )

    def chunks() -> Iterator[np.ndarray]:
        with archive, file:
            for first in range(0, shape[0], chunk):
                part = (min(chunk, shape[0] - first), *shape[1:])
                yield np.frombuffer(file.read(math.prod(part)), np.uint8).reshape(part)

    return shape[0], chunks()
