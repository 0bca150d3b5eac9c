"""The Inception-v3 of the Fréchet Inception distance, as TensorFlow 1 ran it (arXiv 1512.00567).

Every FID in print is of this one network and these weights, which differ from those of other
Inception-v3s: average pools that leave the padding out, a maximum pool in the last block, 1008
classes. The weights are those that torch-fidelity and pytorch-fid publish.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from jetflow.types import AnyArray

SIZE = 299  # pixels
RESIZE = f"bilinear to {SIZE}x{SIZE} as in TensorFlow 1, no half-pixel centres"
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # of the spatial features, as in ADM's evaluator

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
STEM = (
    ("Conv2d_1a_3x3/2", "Conv2d_2a_3x3/1", "Conv2d_2b_3x3", "maximum/2"),  # "/1": no padding
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3/1", "maximum/2"),
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
    folded["fc"] = {"kernel": tensors["fc.weight"].T.astype(np.float32)}
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


def activations(weights: Any, images: Num[AnyArray, "B H W C"]) -> dict[str, Float[Array, "B ..."]]:
    """What the network computes of images with values 0..255 and 1 or 3 channels.

    Args:
        weights: as `fold` makes them.

    Returns:
        "64", "192", "768", "2048": features averaged over the image, by their number; the FID is of
        the last. "logits": of 1008 classes, without bias. "spatial": [B, 17, 17, 7], the sFID's.
    """
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))  # gray is the same in all channels
    x = (resize(images.astype(jnp.float32)) - 128) / 128
    found = {}
    for features, steps in zip(("64", "192"), STEM, strict=True):
        x = _chain(weights, "", steps, x)
        found[features] = x.mean((1, 2))
    for name, branches in BLOCKS.items():
        outputs = [_chain(weights, f"{name}.", branch.split(), x) for branch in branches]
        if name == "Mixed_6d":
            found["spatial"] = outputs[0][..., :SPATIAL_CHANNELS]
        x = jnp.concatenate(outputs, axis=-1)
        if name == "Mixed_6e":
            found["768"] = x.mean((1, 2))
    found["2048"] = x.mean((1, 2))
    found["logits"] = jnp.matmul(
        found["2048"], weights["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST
    )
    return found


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
