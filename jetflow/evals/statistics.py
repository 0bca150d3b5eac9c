"""What is kept of the features of many images: their moments, and some of the features themselves.

All on the host and in float64, in memory that does not grow with the number of images.
"""

import copy
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

SIZES = {"pooled": 2048, "spatial": 17 * 17 * 7}  # features of the FID, and of the sFID


@dataclasses.dataclass
class Moments:
    """Sums from which mean and covariance follow.

    Attributes:
        count: of the rows.
        total, outer: the sum of the rows, and of their outer products with themselves.
    """

    count: int
    total: Float[np.ndarray, "D"]
    outer: Float[np.ndarray, "D D"]

    @classmethod
    def empty(cls, size: int) -> "Moments":
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def add(self, rows: Float[np.ndarray, "N D"]) -> None:
        rows = rows.astype(np.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows

    def mean(self) -> Float[np.ndarray, "D"]:
        return self.total / self.count

    def covariance(self) -> Float[np.ndarray, "D D"]:
        """With N − 1, as `numpy.cov`; zero for a single row."""
        mean = self.mean()
        scatter = self.outer - self.count * np.outer(mean, mean)
        return scatter / max(self.count - 1, 1)


class Statistics:
    """The features of `total` images, of which `keep`, chosen at random, are kept themselves.

    Attributes:
        pooled, spatial: moments of the FID's and the sFID's features.
        done: images that all processes have seen together.
        broken: those of them that were not finite.
    """

    def __init__(self, total: int, keep: int):
        # At random, since images may come class by class; fixed, so that all processes agree.
        chosen = np.random.default_rng(0).permutation(total)[:keep]
        self._chosen = np.zeros(total, bool)
        self._chosen[chosen] = True
        self.pooled = Moments.empty(SIZES["pooled"])
        self.spatial = Moments.empty(SIZES["spatial"])
        self.broken = self.done = 0
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def add(
        self,
        index: Int[np.ndarray, "N"],
        pooled: Float[np.ndarray, "N P"],
        spatial: Float[np.ndarray, "N S"],
    ) -> None:
        """The features of the images of these numbers; those below 0 are padding."""
        real = index >= 0
        self.pooled.add(pooled[real])
        self.spatial.add(spatial[real])
        kept = real & self._chosen[index]
        if kept.any():
            self._kept.append((index[kept], pooled[kept]))

    def kept(self) -> tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K P"]]:
        """Numbers and features of the images that are kept, in the order of their numbers."""
        index = np.concatenate([np.zeros(0, np.int64), *[index for index, _ in self._kept]])
        rows = [np.zeros((0, SIZES["pooled"]), np.float32), *[rows for _, rows in self._kept]]
        order = np.argsort(index)
        return index[order], np.concatenate(rows)[order]

    def merged(self) -> "Statistics":
        """Those of all processes together; the same on each of them."""
        arrays = self.arrays()
        index, features = arrays.pop("index"), arrays.pop("features")
        sums = {name: _gather(array).sum(0) for name, array in arrays.items()}
        missing = int(_gather(np.array([float(len(index))])).max()) - len(index)
        index = _gather(np.pad(index.astype(float), (0, missing), constant_values=-1)).reshape(-1)
        features = _gather(np.pad(features, ((0, missing), (0, 0)))).reshape(-1, SIZES["pooled"])
        real = index >= 0
        rows = {"index": index[real].astype(int), "features": features[real].astype(np.float32)}
        merged = copy.copy(self)  # what is left as it is, every process counts alike
        merged.restore(sums | rows)
        return merged

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was added, for `restore`."""
        index, features = self.kept()
        named: dict[str, np.ndarray] = {"index": index, "features": features}
        for name, moments in (("pooled", self.pooled), ("spatial", self.spatial)):
            named[f"{name}_count"] = np.array([float(moments.count)])
            named[f"{name}_total"], named[f"{name}_outer"] = moments.total, moments.outer
        return named

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put what `arrays` gave in the place of what was added."""
        for name in ("pooled", "spatial"):
            count, total, outer = (arrays[f"{name}_{part}"] for part in ("count", "total", "outer"))
            setattr(self, name, Moments(int(count[0]), np.array(total), np.array(outer)))
        self._kept = [(arrays["index"], arrays["features"])]


def _gather(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "P ..."]:
    """Float64 arrays of all processes. Their bits travel as integers: JAX would round them."""
    bits = np.ascontiguousarray(array, np.float64).view(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(bits))
    gathered = gathered.reshape(jax.process_count(), *bits.shape)  # -1 fails on empty arrays
    return np.ascontiguousarray(gathered).view(np.float64)
