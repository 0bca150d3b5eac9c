"""What samples are compared with: statistics of real images, in a file of ours or of ADM's."""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jetflow.evals.features import images_of
from jetflow.evals.fid import Gaussian
from jetflow.evals.statistics import SIZES, Statistics
from jetflow.evals.weights import Network
from jetflow.files import write_atomically
from jetflow.types import UsageError

# What measures images: the chunks of them, and their number -> their statistics.
Measure = Callable[[Iterator[UInt8[np.ndarray, "_ H W C"]], int], Statistics]

MOMENTS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM names them


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images.

    Attributes:
        pooled, spatial: of the FID's and the sFID's features; None where the file has none.
        features: of some of the images; K may be 0.
        facts: where they come from, for the record.
    """

    pooled: Gaussian | None
    spatial: Gaussian | None
    features: Float[np.ndarray, "K P"]
    facts: dict[str, Any]

    def gaussian(self, which: str) -> Gaussian:
        """ "pooled" or "spatial".

        Raises:
            UsageError: if the file has neither these statistics nor images.
        """
        found = getattr(self, which)
        if found is None:
            mean, covariance = MOMENTS[which]
            raise UsageError(
                f"--reference {self.facts['file']} has no {mean} and {covariance}, and no images "
                "to make them of; give one that has, or leave the metric out"
            )
        return found

    def some_features(self) -> Float[np.ndarray, "K P"]:
        """Raises a UsageError if there are none."""
        if not len(self.features):
            raise UsageError(
                f"--reference {self.facts['file']} has neither images nor features; give one that "
                "has, such as `jetflow evaluate --make_reference` writes, or ask for fid or sfid"
            )
        return self.features


def write(path: Path, statistics: Statistics, network: Network, data: dict[str, Any]) -> None:
    """A reference file: moments under ADM's names, some features, and where all comes from."""
    arrays: dict[str, Any] = {"features": statistics.kept()[1]}
    for name, (mean, covariance) in MOMENTS.items():
        gaussian = Gaussian.of(getattr(statistics, name))
        arrays[mean], arrays[covariance] = gaussian.mean, gaussian.covariance
    facts = {"data": data, "images": statistics.done, "network": network.facts()}
    with write_atomically(path) as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)


def read(path: Path, network: Network, measure: Measure, *, chunk: int, images: bool) -> Reference:
    """The reference of a file: of `write`, or of ADM's evaluator.

    Args:
        measure: computes statistics of images, where the file has some and they are needed.
        chunk: how many images at a time.
        images: whether some images' features are needed, besides the moments.

    Raises:
        UsageError: if it cannot be read, or was made with another network; moments that do not say
            of which network they are, as ADM's, are of the published one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            # Images are read later, and never as a whole.
            arrays = {name: file[name] for name in names - {"images", "arr_0"}}
        facts = json.loads(str(arrays.pop("facts"))) if "facts" in arrays else {}
        digest = checksum(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"--reference {path} cannot be read ({error}); expected an .npz of `jetflow evaluate "
            "--make_reference`, or of ADM's evaluator"
        ) from error
    found = {name: _gaussian(path, arrays, name) for name in MOMENTS}
    _check_network(path, facts, network, has_moments=any(found.values()))
    features = arrays.get("features", np.zeros((0, SIZES["pooled"]), np.float32))
    if names & {"images", "arr_0"} and (images or found["pooled"] is None):
        count, chunks = images_of(path, "reference", chunk)
        statistics = measure(chunks, count)
        features = statistics.kept()[1]
        if found["pooled"] is None:  # else the moments are of more images than there are in it
            facts["images"] = count
        found = {
            name: known or Gaussian.of(getattr(statistics, name)) for name, known in found.items()
        }
    elif found["pooled"] is None:
        raise UsageError(f"--reference {path} has neither mu and sigma nor images (arr_0)")
    record = {"file": str(path), "checksum": digest, "data": None, "images": None, **facts}
    record.pop("network", None)
    return Reference(found["pooled"], found["spatial"], features, record)


def _gaussian(path: Path, arrays, which: str) -> Gaussian | None:
    (mean, covariance), size = MOMENTS[which], SIZES[which]
    if mean not in arrays or covariance not in arrays:
        return None
    if arrays[mean].shape != (size,) or arrays[covariance].shape != (size, size):
        raise UsageError(
            f"--reference {path} has {mean} {list(arrays[mean].shape)} and {covariance} "
            f"{list(arrays[covariance].shape)}; expected {size} features"
        )
    return Gaussian(*(arrays[name].astype(np.float64) for name in (mean, covariance)))


def _check_network(
    path: Path, facts: dict[str, Any], network: Network, *, has_moments: bool
) -> None:
    here = network.facts()
    for name, value in facts.get("network", {}).items():
        if value != here.get(name):
            raise UsageError(
                f"--reference {path} was made with {name} {value}, but here it is "
                f"{here.get(name)}; make it again with --make_reference, or give "
                "--inception_weights"
            )
    if has_moments and "network" not in facts and not network.is_published:
        raise UsageError(
            f"--reference {path} does not say with which network its moments were made, so they "
            f"are taken as of the published one, but here are weights {network.sha256[:8]}; leave "
            "--inception_weights out, or make a reference with --make_reference"
        )


def checksum(path: Path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
