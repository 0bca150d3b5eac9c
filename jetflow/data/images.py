"""Image files to pixels: the one place where a data set's archives are decoded and resized.

What a file is, its content says, never its name. The rules, in order:

- the first frame of several;
- turned upright as its EXIF orientation says;
- 16 bits a channel: the high byte is kept; floating point: refused;
- a palette is looked up; transparent pixels are laid on white;
- grey becomes R = G = B, CMYK becomes RGB by Pillow's formula; colour profiles are not applied;
- a file that ends too early is refused, not filled up.
"""

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps


class Unreadable(Exception):
    """A file that is no whole image, or not one of the size that its data set has."""


def decode(content: bytes) -> Image.Image:
    """An image file as an upright RGB image of 8 bits.

    Raises:
        Unreadable: with the reason.
    """
    if not content:
        raise Unreadable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size and metadata; what is wrong raises
            with Image.open(io.BytesIO(content)) as file:
                file.load()
                return _as_rgb(ImageOps.exif_transpose(file))
    except (Unreadable, MemoryError):  # the machine lacks memory: the file may be whole
        raise
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged files
        reason = " ".join(str(error).split())
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image that Pillow knows"  # its message has a memory address
        raise Unreadable(reason or type(error).__name__) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits, which Pillow keeps in 16 or 32
        high = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF) >> 8
        image = Image.fromarray(high.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")  # a copy of what is RGB already


def resize_method(size: int) -> str:
    """How `resize` makes an image of size x size, for the record."""
    return f"short side to {size} by a box filter (bicubic where it enlarges), centre crop"


def resize(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size C"]:
    """The centred square of an image, at size x size.

    It is as wide as the short side, and its offset is rounded down. Shrinking averages over areas
    (a box filter, antialiased), which is how the small ImageNets of arXiv 1707.08819 were made.
    """
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    method = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    square = image.resize((size, size), method, box=(left, top, left + side, top + side))
    return np.asarray(square)


def exactly(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size C"]:
    """The pixels of an image that must be size x size already.

    Raises:
        Unreadable: it is of another size.
    """
    if image.size != (size, size):
        raise Unreadable(f"{image.width}x{image.height} pixels instead of {size}x{size}")
    return np.asarray(image)
