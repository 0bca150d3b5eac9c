"""What samples are compared with: statistics of real images, in a file of ours or of ADM's."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jetflow.archive import Images, read_images
from jetflow.evals.distances import Gaussian
from jetflow.evals.features import MOMENTS, SIZES, Features, Statistics
from jetflow.evals.inception import Network
from jetflow.files import write_atomically
from jetflow.npz import Npz
from jetflow.types import UsageError

Measure = Callable[[Images], Statistics]

DATA = {"name", "version", "split", "resize", "checksum"}  # of the facts about data
EXPECTED = "an .npz of `jetflow evaluate --make_reference`, or of ADM's evaluator"


def write(path: Path, statistics: Statistics, network: Network, data: dict[str, Any]) -> None:
    """A reference file: moments under ADM's names, some features, and where all comes from."""
    arrays = statistics.parts()
    for name, keys in MOMENTS.items():
        arrays |= zip(keys, arrays.pop(name), strict=True)
    facts = {"data": data, "images": statistics.done, "network": network.facts()}
    with write_atomically(path) as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)


def read(path: Path, network: Network, measure: Measure, *, chunk: int, images: bool) -> Features:
    """The reference of a file: of `write`, or of ADM's evaluator.

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
    for name, value in made_with.items():
        if value != network.facts().get(name):
            raise UsageError(
                f"reference {path} was made with {name} {value}, but this evaluation has "
                f"{network.facts().get(name)}; make a reference with --make_reference, or give or "
                "leave out --inception_weights"
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
        and isinstance(facts["images"], int | None)
        and isinstance(facts.get("network", {}), dict)
    ):
        raise file.fault("facts: other fields")
    return {name: facts[name] for name in ("data", "images", "network") if name in facts}


def checksum(path: Path) -> str:
    """The first 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
