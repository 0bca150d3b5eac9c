"""Features of images: computed on the mesh, and what is kept of them on the host of each process.

All in float64, in memory that does not grow with the number of images.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from jetflow import hosts, sharding
from jetflow.evals import inception
from jetflow.evals.batching import Batching
from jetflow.evals.distances import Gaussian
from jetflow.files import write_atomically
from jetflow.npz import Npz
from jetflow.types import Batch, UsageError

SIZES = {"pooled": 2048, "spatial": 17 * 17 * 7}  # features of the FID, and of the sFID
MOMENTS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM names them
SAVED_EVERY = 5000  # images


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
        network: inception.Network,
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

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write all that was added, on the first process; `settings` is what it depends on."""
        if hosts.is_first():
            with write_atomically(path) as file:
                np.savez(file, settings=np.array(json.dumps(settings)), **self.arrays)

    def resume(self, path: Path, settings: Mapping[str, Any]) -> None:
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
