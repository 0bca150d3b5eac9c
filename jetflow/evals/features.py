"""Features of images, computed on the mesh and added up on the hosts."""

import functools
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt8

from jetflow import sharding
from jetflow.evals import inception
from jetflow.evals.statistics import Statistics
from jetflow.evals.weights import Network
from jetflow.types import NO_LABEL, Batch, UsageError


def collect(
    network: Network,
    batches: Iterable[Batch],
    statistics: Statistics,
    *,
    mesh: Mesh,
    batch_size: int,
    after: Callable[[int], None] = lambda images: None,
) -> None:
    """Add the features of the images in these batches to the statistics of this process.

    Args:
        batches: this process's rows of them, as `sharding.local_rows` says; of index -1: padding.
        batch_size: over all devices of the mesh.
        after: called after each batch with the number of its images, over all processes.
    """
    arrays = jax.device_put(network.arrays, sharding.replicated(mesh))
    compute = _program(sharding.batch_sharding(mesh))
    for batch in batches:
        placed = sharding.put_batch(batch, mesh, batch_size)
        with sharding.on(mesh):
            index, pooled, spatial = compute(arrays, placed.image, placed.index)
        statistics.add(_own_rows(index), _own_rows(pooled), _own_rows(spatial))
        images = int((index >= 0).sum())
        statistics.done += images
        after(images)


@functools.cache
def _program(where: jax.sharding.NamedSharding) -> Callable:
    def compute(arrays, images, index):
        found = inception.activations(arrays, images)
        return index, found["2048"], found["spatial"].reshape(len(images), -1)

    return jax.jit(compute, out_shardings=where)


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows on this process's devices; those that lie on several devices, once in all."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    empty = np.zeros((0, *array.shape[1:]), array.dtype)
    return np.concatenate([empty, *[np.asarray(shard.data) for shard in shards]])


def in_batches(
    chunks: Iterable[UInt8[np.ndarray, "_ H W C"]],
    *,
    batch_size: int,
    rows: Int[np.ndarray, "R"],
    start: int = 0,
) -> Iterator[Batch]:
    """Images that every process has, in chunks of at most a batch, as the batches of `collect`.

    Args:
        start: the number of the first image.
    """
    for images in chunks:
        padding = batch_size - len(images)
        index = np.pad(start + np.arange(len(images)), (0, padding), constant_values=-1)
        start += len(images)
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        label = np.full(len(rows), NO_LABEL, np.int32)
        yield Batch(images[rows], label, index[rows].astype(np.int32))


def images_of(path: Path, flag: str, chunk: int) -> tuple[int, Iterator[np.ndarray]]:
    """How many images an .npz has, and they themselves, so many at a time.

    Its array "images", or ADM's "arr_0", is uint8 [N, H, W, C], with 1 or 3 channels. It is
    read as it is needed, and never as a whole.

    Raises:
        UsageError: if there are no such images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {"images.npy", "arr_0.npy"} & set(archive.namelist())
            if len(names) != 1:
                raise ValueError("it has neither images nor arr_0")
            (name,) = names
            with archive.open(name) as file:
                shape, dtype = _header(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"--{flag} {path} cannot be read ({error}); expected an .npz with images, as "
            "`jetflow sample --npz` writes it"
        ) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
        raise UsageError(
            f"--{flag} {path} holds {dtype} {list(shape)}; expected uint8 [N, H, W, 1 or 3]"
        )
    return shape[0], _chunks(path, name, chunk)


def finite_of(path: Path) -> Bool[np.ndarray, "N"] | None:
    """Which images of such an .npz were finite when they were drawn, where it says so."""
    with np.load(path, allow_pickle=False) as file:
        return file["finite"].astype(bool) if "finite" in file else None


def _chunks(path: Path, name: str, chunk: int) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        (count, *shape), _ = _header(file)
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            raw = file.read(size * int(np.prod(shape)))
            yield np.frombuffer(raw, np.uint8).reshape(size, *shape)


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = read[version](file)
    if is_fortran:
        raise ValueError("its images are in Fortran's order")
    return shape, dtype
