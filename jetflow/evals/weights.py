"""The published weights of the FID's network: found or downloaded, and checked."""

import dataclasses
import hashlib
import os
import re
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jetflow import hosts
from jetflow.evals import inception
from jetflow.files import write_atomically
from jetflow.pth import read_pth
from jetflow.types import UsageError

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
NAME = URL.rpartition("/")[2]
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins
DIMENSIONS = {"64": (64,), "192": (192,), "768": (768,), "2048": (2048,), "logits": (1008,),
              "spatial": (17, 17, inception.SPATIAL_CHANNELS)}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The network with its weights.

    Attributes:
        arrays: as `inception.fold` makes them.
        sha256: of the file that they came in, in hex.
    """

    arrays: Any
    sha256: str

    @property
    def is_published(self) -> bool:
        return self.sha256.startswith(PUBLISHED)

    def facts(self) -> dict[str, Any]:
        """What is written of it beside every result."""
        return {
            "weights_sha256": self.sha256,
            "published_weights": self.is_published,
            "resize": inception.RESIZE,
        }


def load(path: str | os.PathLike | None = None) -> Network:
    """The network of a file, by default of the published one, which is downloaded once.

    A name that ends in 8 hex digits, as published ones do, must begin the file's SHA-256.

    Raises:
        UsageError: if it is not there, cannot be downloaded, is damaged or of another network.
    """
    path = _cached() if path is None else Path(path)
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"--inception_weights {path} cannot be read ({error}); expected {NAME}, from {URL}"
        ) from error
    promised = re.search(r"-([0-9a-f]{8})\.", path.name)
    if promised and not found.startswith(promised[1]):
        raise UsageError(
            f"{path} is damaged: its SHA-256 begins {found[:8]}, but its name says {promised[1]}; "
            f"delete it and download {URL} again"
        )
    return Network(_checked(path, read_pth(path)), found)


def _checked(path: Path, tensors: Mapping[str, np.ndarray]) -> Any:
    """The folded weights, if they are those of the network."""
    try:
        arrays = inception.fold(dict(tensors))
        image = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), jnp.float32)
        made = jax.eval_shape(inception.activations, arrays, image)
        fits = {name: array.shape[1:] for name, array in made.items()} == DIMENSIONS
    except KeyError as error:
        raise UsageError(
            f"{path} is not of the FID's Inception-v3: it has no {error.args[0]}; expected {NAME}"
        ) from error
    except (TypeError, ValueError):  # shapes that do not fit each other
        fits = False
    if not fits:
        raise UsageError(
            f"{path} is not of the FID's Inception-v3: its tensors have other shapes; "
            f"expected {NAME}, from {URL}"
        )
    return arrays


def _cached() -> Path:
    """The published file in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(cache).expanduser() / "jetflow" / NAME
    if not path.exists():
        _download(path)
    return path


def _download(path: Path) -> None:
    if hosts.is_first():
        print(f"downloading {URL} to {path} (once, 95 MB)", file=sys.stderr, flush=True)
    try:
        with write_atomically(path) as file, urllib.request.urlopen(URL, timeout=60) as answer:
            digest = hashlib.sha256()
            while block := answer.read(2**20):
                digest.update(block)
                file.write(block)
            if not digest.hexdigest().startswith(PUBLISHED):
                raise OSError(f"what came has the SHA-256 {digest.hexdigest()[:8]}…")
    except OSError as error:  # of the disk, and of the network, too
        raise UsageError(
            f"the weights of the FID's network cannot be downloaded ({error}); on a machine with "
            f"internet, get {URL}, and give the file with --inception_weights PATH/{NAME}"
        ) from error
