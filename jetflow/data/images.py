"""Image files to pixels: the one place where a data set's archives are decoded and resized.

What a file is, its content says, never its name. The rules, in order:

- the first frame of several;
- turned upright as its EXIF orientation says;
- 16 bits a channel: the high byte is kept; floating point: refused;
- a palette is looked up; transparent pixels are laid on white;
- grey becomes R = G = B, CMYK becomes RGB by Pillow's formula; colour profiles are not applied;
- a file that ends too early is refused, not filled up.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MAX_PIXELS = 500_000_000  # of an image; RGB takes three bytes each
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A file that is no whole image, or not one of the size that its data set has."""


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as an upright RGB image of 8 bits.

    Raises:
        Unreadable: with the reason.
    """
    if not content:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(content)) as file:
            if (pixels := file.width * file.height) > max_pixels:
                raise Unreadable(f"{pixels:,} pixels: --max_pixels is {max_pixels:,}; raise it")
            file.load()
            return _as_rgb(_upright(file))
    except (Unreadable, MemoryError):  # the machine lacks memory: the file may be whole
        raise
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged files
        reason = " ".join(str(error).split())
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image that Pillow knows"  # its message has a memory address
        raise Unreadable(reason or type(error).__name__) from error


@contextlib.contextmanager
def large_files() -> Iterator[None]:
    """Lifts Pillow's limit of size and hides its warnings, in all threads; `decode` has its own."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata; what is wrong with pixels raises
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _upright(file: Image.Image) -> Image.Image:
    try:
        orientation = file.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata costs no pixels
        orientation = None
    return file.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else file


def _as_rgb(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise Unreadable("floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits, which Pillow keeps in 16 or 32
        values = np.asarray(image).astype(np.int64)
        high = np.clip(values, 0, 0xFFFF) >> 8
        high = np.where(values == transparent, 0xFF, high)
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if isinstance(transparent, tuple) and max(transparent) > 0xFF:  # Pillow keeps the high byte
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if "A" in image.getbands() or transparent is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


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
