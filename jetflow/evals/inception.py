"""The Inception-v3 of the Fréchet Inception distance, as TensorFlow 1 ran it (arXiv 1512.00567).

Every published FID is of this one network and these weights, which differ from those of other
Inception-v3s: average pools that leave the padding out, a maximum pool in the last block, 1008
classes. The weights are those that torch-fidelity and pytorch-fid publish.
"""

import dataclasses
import hashlib
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from jetflow import hosts
from jetflow.files import write_atomically
from jetflow.options import expanded
from jetflow.pth import read_pth
from jetflow.types import AnyArray, UsageError

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
NAME = URL.rpartition("/")[2]
RULE = "python tests/inception_rule.py rule.pth in a clone, then --inception_weights rule.pth"
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins

SIZE = 299  # pixels
RESIZE = f"bilinear to {SIZE}x{SIZE} as in TensorFlow 1, no half-pixel centres"
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # of the spatial features, as in ADM's evaluator
SHAPES = [(2048,), (17, 17, SPATIAL_CHANNELS)]  # of an image's features

# A block is the concatenation of its branches, a branch a chain of convolutions or pools. "a|b" are
# two convolutions side by side; "/2" has stride 2 and no padding, all others keep the size.
_AVERAGE, _MAXIMUM = "average branch_pool", "maximum branch_pool"
_A = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
      _AVERAGE)  # fmt: skip
_B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "maximum/2")
_C = ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
      "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
      _AVERAGE)  # fmt: skip
_D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2",
      "maximum/2")  # fmt: skip
_E = ("branch1x1", "branch3x3_1 branch3x3_2a|branch3x3_2b",
      "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b")  # fmt: skip
BLOCKS = {
    "Mixed_5b": _A, "Mixed_5c": _A, "Mixed_5d": _A, "Mixed_6a": _B, "Mixed_6b": _C, "Mixed_6c": _C,
    "Mixed_6d": _C, "Mixed_6e": _C, "Mixed_7a": _D, "Mixed_7b": (*_E, _AVERAGE),
    "Mixed_7c": (*_E, _MAXIMUM),
}  # fmt: skip
STEM = ("Conv2d_1a_3x3/2", "Conv2d_2a_3x3/1", "Conv2d_2b_3x3", "maximum/2",  # "/1": no padding
        "Conv2d_3b_1x1", "Conv2d_4a_3x3/1", "maximum/2")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The network with its weights.

    Attributes:
        arrays: as `fold` makes them.
        sha256: of their file, in hex.
    """

    arrays: Any
    sha256: str

    @property
    def is_published(self) -> bool:
        return self.sha256.startswith(PUBLISHED)

    def facts(self) -> dict[str, Any]:
        """The part of every record that names the network."""
        return {
            "weights_sha256": self.sha256,
            "published_weights": self.is_published,
            "resize": RESIZE,
        }


def load(path: Path | None = None) -> Network:
    """The network of a file, by default of the published one, which is downloaded once.

    A name that ends in 8 hex digits, as published ones do, must begin the file's SHA-256.

    Raises:
        UsageError: if it is missing, cannot be downloaded, is damaged or of another network.
    """
    if path is None:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = expanded("inception_weights", cache) / "jetflow" / NAME
        if not path.exists():
            _download(path)
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"inception_weights {path} cannot be read ({error}); expected {NAME}, from {URL}"
        ) from error
    promised = re.search(r"-([0-9a-f]{8})\.", path.name)
    if promised and not digest.startswith(promised[1]):
        raise UsageError(
            f"{path} is damaged: its SHA-256 begins {digest[:8]}, but its name says {promised[1]}; "
            f"delete it and download {URL} again"
        )
    return Network(_folded(path, read_pth(path)), digest)


def _download(path: Path) -> None:
    hosts.note(f"downloading {URL} to {path} (once, 95 MB)")
    try:
        with write_atomically(path) as file, urllib.request.urlopen(URL, timeout=60) as answer:
            digest = hashlib.sha256()
            while block := answer.read(2**20):
                digest.update(block)
                file.write(block)
            if not digest.hexdigest().startswith(PUBLISHED):
                raise OSError(f"the file there has the SHA-256 {digest.hexdigest()[:8]}…")
    except OSError as error:  # of the disk or of the network
        raise UsageError(
            f"the weights of the FID's network cannot be downloaded ({error}); on a machine with "
            f"internet, get {URL}, and give the file with --inception_weights PATH/{NAME}; or try "
            f"it offline with weights made by a rule: {RULE}"
        ) from error


def _folded(path: Path, tensors: Mapping[str, np.ndarray]) -> Any:
    """The folded weights, if they are those of the network."""
    problem = "its tensors have other shapes"
    try:
        arrays = fold(dict(tensors))
        image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
        outputs = jax.eval_shape(activations, arrays, image)
        if [array.shape[1:] for array in outputs] == SHAPES:
            return arrays
    except KeyError as error:
        problem = f"it has no {error.args[0]}"
    except (TypeError, ValueError):  # shapes that do not fit each other
        pass
    raise UsageError(
        f"{path} is not of the FID's Inception-v3: {problem}; expected {NAME}, from {URL}"
    )


def fold(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The published tensors as kernels [H, W, in, out] and biases, batch norm folded into them.

    Other tensors, such as counters of the training, play no part.

    Raises:
        KeyError: the name of a tensor that is missing.
    """
    folded = {}
    names = [key.removesuffix(".conv.weight") for key in tensors if key.endswith(".conv.weight")]
    for name in names:
        norm = {
            part: tensors[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
        gain = norm["weight"] / np.sqrt(norm["running_var"] + BATCH_NORM_EPSILON)
        kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * gain
        bias = norm["bias"] - norm["running_mean"] * gain
        folded[name] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return folded


def resize(images: Float[AnyArray, "B H W C"]) -> Float[Array, "B S S C"]:
    """TensorFlow 1's bilinear resize: output pixel i is input pixel i·(size / 299), interpolated.

    Corners are not aligned and centres not shifted; `jax.image.resize` shifts them.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        place = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
        below = np.floor(place).astype(int)
        shape = [1, 1, 1, 1]
        shape[axis] = SIZE
        weight = jnp.asarray((place - below).reshape(shape))
        low = jnp.take(images, below, axis)
        images = low + (jnp.take(images, np.minimum(below + 1, size - 1), axis) - low) * weight
    return images


def activations(
    weights: Any, images: Num[AnyArray, "B H W C"]
) -> tuple[Float[Array, "B P"], Float[Array, "B Q Q S"]]:
    """What the network computes of images with values 0..255 and 1 or 3 channels.

    Args:
        weights: as `fold` makes them.

    Returns:
        The features of the FID, averaged over the image, and those of the sFID.
    """
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))  # gray is the same in all channels
    x = (resize(images.astype(jnp.float32)) - 128) / 128
    x = _chain(weights, "", STEM, x)
    spatial = x
    for name, branches in BLOCKS.items():
        outputs = [_chain(weights, f"{name}.", branch.split(), x) for branch in branches]
        spatial = outputs[0][..., :SPATIAL_CHANNELS] if name == "Mixed_6d" else spatial
        x = jnp.concatenate(outputs, axis=-1)
    return x.mean((1, 2)), spatial


def _chain(weights, prefix: str, steps, x):
    for step in steps:
        name, _, stride = step.partition("/")
        if name in ("average", "maximum"):
            x = _average(x) if name == "average" else _maximum(x, stride)
        else:
            parts = [_convolve(weights[prefix + part], x, stride) for part in name.split("|")]
            x = jnp.concatenate(parts, axis=-1)
    return x


def _convolve(weights, x, stride: str):
    y = jax.lax.conv_general_dilated(
        x, weights["kernel"], (int(stride or 1),) * 2, "VALID" if stride else "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return jax.nn.relu(y + weights["bias"])


def _maximum(x, stride: str):
    return nn.max_pool(x, (3, 3), (int(stride or 1),) * 2, "VALID" if stride else "SAME")


def _average(x):
    """Over 3×3 pixels, of which at the border only those within the image count."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
