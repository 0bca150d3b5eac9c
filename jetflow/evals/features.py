"""Features of images: computed on the mesh, and what is kept of them on the host of each process.

All in float64, in memory that does not grow with the number of images.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from jetflow import hosts, sharding
from jetflow.archive import Images, read_images
from jetflow.buckets import AnyPath
from jetflow.evals import inception
from jetflow.evals.batching import Batching
from jetflow.evals.distances import Gaussian
from jetflow.evals.inception import Network
from jetflow.files import if_possible, write_atomically
from jetflow.npz import Npz
from jetflow.types import Batch, Interruption, UsageError

SIZES = {"pooled": 2048, "spatial": 17 * 17 * 7}  # features of the FID, and of the sFID
MOMENTS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM names them
SAVED_EVERY = 5000  # images
DATA = {"name", "version", "split", "resize", "checksum"}  # of the facts about data
EXPECTED = "an .npz of `jetflow evaluate --make_reference`, or of ADM's evaluator"


class Features(NamedTuple):
    """What is known of the features of some images.

    Attributes:
        parts: the gaussians "pooled", for the FID, and "spatial", for the sFID, and the "features"
            of some images; those of them that there are.
        facts: where the images come from, for the record.
    """

    parts: dict[str, Any]
    facts: dict[str, Any]

    def part(self, name: str) -> Any:
        """Raises a UsageError if a file, of which they are, has neither this part nor images."""
        if name not in self.parts:
            raise UsageError(
                f"reference {self.facts['file']} has no {' and '.join(MOMENTS.get(name, [name]))}, "
                "and no images to make them of; give one that has, such as `jetflow evaluate "
                "--make_reference` writes, or leave the metric out"
            )
        return self.parts[name]


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

    def collect(
        self,
        network: Network,
        batching: Batching,
        batches: Iterable[Batch],
        name: str,
        save: Callable[[], None] = lambda: None,
    ) -> "Statistics":
        """These statistics, with the features of the images in some batches added.

        Args:
            name: what the images are, for a progress bar.
            save: called after each `SAVED_EVERY` images.
        """
        arrays = jax.device_put(network.arrays, sharding.replicated(batching.mesh))
        saved = self.done
        for (pooled, spatial), _, index in batching.results(
            lambda batch: _features(arrays, batch.image),
            batches, total=len(self._slot), name=name, done=saved,
        ):  # fmt: skip
            self.add(index, pooled, spatial)
            if self.done - saved >= SAVED_EVERY:
                saved = self.done
                save()
        return self

    def parts(self) -> dict[str, Any]:
        """As `Features` have them; of a gaussian mean and covariance, with N − 1."""
        parts: dict[str, Any] = {"features": self.arrays["features"]}
        for name in SIZES:
            mean = self.arrays[f"{name}_sum"] / self.done
            scatter = self.arrays[f"{name}_outer"] - self.done * np.outer(mean, mean)
            parts[name] = Gaussian(mean, scatter / max(self.done - 1, 1))  # zero of a single image
        return parts

    def save(self, path: AnyPath, settings: Mapping[str, Any]) -> None:
        """Write all that was added, on the first process; `settings` is what it depends on."""
        if hosts.is_first():
            with if_possible("what a kill would cost"), write_atomically(path) as file:
                np.savez(file, settings=np.array(json.dumps(settings)), **self.arrays)

    def resume(self, path: AnyPath, settings: Mapping[str, Any]) -> None:
        """Go on from what `save` wrote with the same settings, if the first process finds it."""
        if hosts.is_first() and path.exists():
            try:
                file = Npz(path, "the file", "statistics of samples")
                if file.facts("settings") == json.loads(json.dumps(settings)):
                    self.arrays = {
                        name: file.array(name, array.dtype.char, array.shape)
                        for name, array in self.arrays.items()
                    }
            except UsageError as error:
                if isinstance(error, Interruption):
                    raise
                logging.warning("%s: all samples are drawn again", error)
        if jax.process_count() > 1:
            self.arrays = {name: _agreed(array) for name, array in self.arrays.items()}


def _agreed(array: np.ndarray) -> np.ndarray:
    """The first process's array. Its bits travel as integers: JAX would round float64."""
    bits = multihost_utils.broadcast_one_to_all(array.view(np.uint32))
    return np.array(bits).view(array.dtype)


@jax.jit
def _features(arrays, images):
    pooled, spatial = inception.activations(arrays, images)
    return pooled, spatial.reshape(len(images), -1)


def write_reference(
    path: AnyPath, statistics: Statistics, network: Network, data: dict[str, Any]
) -> None:
    """A reference file: moments under ADM's names, some features, and where all comes from."""
    arrays = statistics.parts()
    for name, keys in MOMENTS.items():
        arrays |= zip(keys, arrays.pop(name), strict=True)
    facts = {"data": data, "images": statistics.done, "network": network.facts()}
    with write_atomically(path) as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)


def read_reference(
    path: AnyPath,
    network: Network,
    measure: Callable[[Images], Statistics],
    *,
    chunk: int,
    images: bool,
) -> Features:
    """The reference of a file: of `write_reference`, or of ADM's evaluator.

    Args:
        measure: computes statistics of images, where the file has some and they are needed.
        chunk: how many images at a time.
        images: whether some images' features are needed, besides the moments.

    Raises:
        UsageError: if it cannot be read, or was made with another network. A file that does not
            name its network, such as ADM's, is taken as made with the published one.
    """
    file = Npz(path, "reference", EXPECTED)
    parts: dict[str, Any] = {
        name: Gaussian(*(
            _numbers(file, key, (SIZES[name],) * axes).astype(np.float64)
            for axes, key in enumerate(keys, 1)
        ))
        for name, keys in MOMENTS.items() if all(key in file for key in keys)
    }  # fmt: skip
    if images and "features" in file:
        parts["features"] = _numbers(file, "features", (None, SIZES["pooled"]))
    facts = _facts(file)
    made_with = facts.pop("network", {"published_weights": True} if parts else {})
    for name, expected in network.facts().items():
        if (value := made_with.get(name, expected)) != expected:
            raise UsageError(
                f"reference {path} was made with {name} {value!r:.80}, but this evaluation has "
                f"{expected!r}; make a reference with --make_reference, or give or leave out "
                "--inception_weights"
            )
    has_moments = "pooled" in parts
    is_lacking = images and "features" not in parts
    if not has_moments or (is_lacking and ("images" in file or "arr_0" in file)):
        given = read_images(file, chunk)
        parts = measure(given).parts() | parts
        if not has_moments:  # else the moments are of more images than the file has
            facts["images"] = given.num
    return Features(parts, {"file": str(path), "checksum": checksum(path)} | facts)


def _numbers(file: Npz, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    array = file.array(name, "dfe", shape)
    if not np.isfinite(array).all():
        raise file.fault(f"{name} is not finite")
    return array


def _facts(file: Npz) -> dict[str, Any]:
    """Where the content is from: its data and number of images, if it says so, and its network."""
    facts = {"data": None, "images": None} | (file.facts("facts") if "facts" in file else {})
    data = facts["data"]
    if not (
        (data is None or (isinstance(data, dict) and set(data) >= DATA))
        and isinstance(facts["images"], int if data else int | None)
        and isinstance(facts.get("network", {}), dict)
    ):
        raise file.fault("facts: other fields")
    return {name: facts[name] for name in ("data", "images", "network") if name in facts}


def checksum(path: AnyPath) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
