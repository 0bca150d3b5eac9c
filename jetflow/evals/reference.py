"""What samples are compared with: statistics of real images, in a file of ours or of ADM's."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jetflow.evals.distances import Gaussian
from jetflow.evals.features import SIZES, Statistics, images_of
from jetflow.evals.inception import Network
from jetflow.files import write_atomically
from jetflow.types import UsageError

# What measures images: the chunks of them, and their number -> their statistics.
Measure = Callable[[Iterator[UInt8[np.ndarray, "_ H W C"]], int], Statistics]

MOMENTS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM names them


class Reference(NamedTuple):
    """Statistics of real images.

    Attributes:
        parts: the gaussians "pooled", for the FID, and "spatial", for the sFID, and the "features"
            of some images; those of them that the file has.
        facts: where they come from, for the record.
    """

    parts: dict[str, Any]
    facts: dict[str, Any]

    def part(self, name: str) -> Any:
        """Raises a UsageError if the file has neither this part nor images."""
        if name not in self.parts:
            raise UsageError(
                f"reference {self.facts['file']} has no {' and '.join(MOMENTS.get(name, [name]))}, "
                "and no images to make them of; give one that has, such as `jetflow evaluate "
                "--make_reference` writes, or leave the metric out"
            )
        return self.parts[name]


def write(path: Path, statistics: Statistics, network: Network, data: dict[str, Any]) -> None:
    """A reference file: moments under ADM's names, some features, and where all comes from."""
    arrays: dict[str, Any] = {"features": statistics.arrays["features"]}
    for name, keys in MOMENTS.items():
        arrays |= zip(keys, statistics.gaussian(name), strict=True)
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
        UsageError: if it cannot be read, or was made with another network. A file that does not
            name its network, such as ADM's, is taken as made with the published one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            # Images are read later, and never as a whole.
            arrays = {name: file[name] for name in names - {"images", "arr_0"}}
        facts = json.loads(str(arrays.get("facts", "{}")))
        record = {"file": str(path), "checksum": checksum(path), "data": None, "images": None}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"reference {path} cannot be read ({error}); expected an .npz of `jetflow evaluate "
            "--make_reference`, or of ADM's evaluator"
        ) from error
    parts: dict[str, Any] = _gaussians(path, arrays)
    made_with = facts.pop("network", {"published_weights": True} if parts else {})
    for name, value in made_with.items():
        if value != network.facts().get(name):
            raise UsageError(
                f"reference {path} was made with {name} {value}, but this evaluation has "
                f"{network.facts().get(name)}; make a reference with --make_reference, or give or "
                "leave out --inception_weights"
            )
    has_moments = "pooled" in parts
    if "features" in arrays:
        parts["features"] = arrays["features"]
    if names & {"images", "arr_0"} and (images or not has_moments):
        count, chunks = images_of(path, "reference", chunk)
        statistics = measure(chunks, count)
        parts = {name: statistics.gaussian(name) for name in MOMENTS} | parts
        parts["features"] = statistics.arrays["features"]
        if not has_moments:  # else the moments are of more images than the file has
            facts["images"] = count
    elif not has_moments:
        raise UsageError(f"reference {path} has neither mu and sigma nor images (arr_0)")
    return Reference(parts, record | facts)


def _gaussians(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Gaussian]:
    gaussians = {}
    for name, keys in MOMENTS.items():
        if set(keys) <= set(arrays):
            size, shapes = SIZES[name], [list(arrays[key].shape) for key in keys]
            if shapes != [[size], [size, size]]:
                raise UsageError(
                    f"reference {path} has {keys[0]} {shapes[0]} and {keys[1]} {shapes[1]}; "
                    f"expected {size} features"
                )
            gaussians[name] = Gaussian(*(arrays[key].astype(np.float64) for key in keys))
    return gaussians


def checksum(path: Path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
