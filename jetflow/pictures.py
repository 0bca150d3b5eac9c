"""Pictures: samples in a grid, a row a class or about square; PNG and GIF files."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Num, UInt8
from PIL import Image

from jetflow import hosts
from jetflow.buckets import AnyPath, as_path
from jetflow.files import write_atomically
from jetflow.types import Shape, UsageError, is_arrays

MOST_ROWS = 20  # of a picture that a person takes in; classes above that have no row of their own
LARGEST_ASPECT = 2.25  # of a grid with a row a class; longer rows are wrapped
PADDING = 2  # pixels between the images of a grid, before magnification
SHORTEST_SIDE, LONGEST_SIDE = 512, 2048  # pixels; between them, grids are magnified
FRAME = 150  # milliseconds of an animation


def labels_in_turn(num: int, num_classes: int) -> Int[np.ndarray, "N"] | None:
    """Labels 0, 1, 2, … in turn: that of image i does not depend on `num`; None without classes."""
    return np.arange(num, dtype=np.int32) % num_classes if num_classes else None


def rows_by_class(label: Int[np.ndarray, "N"] | None, num: int) -> list[Int[np.ndarray, "_"]]:
    """Which of `num` images stand in each row of a grid.

    Each class has a row, or several of one length where one would be too long. Without classes, and
    with many or few images of each, the grid is about square, in the order of the images.
    """
    side = math.ceil(math.sqrt(num))
    classes = [] if label is None else np.unique(label)
    if not 1 < len(classes) <= MOST_ROWS or num < 2 * len(classes):
        return np.split(np.arange(num), range(side, num, side))
    rows = []
    for each in classes:
        members = np.flatnonzero(label == each)
        wraps = len(members) ** 2 > LARGEST_ASPECT * num
        rows += np.array_split(members, math.ceil(len(members) / side) if wraps else 1)
    return rows


def grid(
    images: UInt8[np.ndarray, "N H W C"], rows: Sequence[Int[np.ndarray, "_"]]
) -> UInt8[np.ndarray, "GH GW 3"]:
    """Images side by side, each row given by their numbers, magnified by a whole number."""
    _, height, width, channels = images.shape
    cell = np.array([height, width]) + PADDING
    shape = cell * (len(rows), max(map(len, rows))) + PADDING
    picture = np.full((*shape, channels), 255, np.uint8)
    for row, members in enumerate(rows):
        for column, member in enumerate(members):
            top, left = PADDING + cell * (row, column)
            picture[top : top + height, left : left + width] = images[member]
    colours = picture[..., :3] if channels >= 3 else np.repeat(picture[..., :1], 3, axis=2)
    factor = max(min(SHORTEST_SIDE // min(shape), LONGEST_SIDE // max(shape)), 1)
    return colours.repeat(factor, axis=0).repeat(factor, axis=1)


def shown(images: Num[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Images as they are; arrays [..., T, D], float32, in grey, from their least to their largest.

    The ends are those of all arrays together, without the outermost hundredth of the values.
    """
    if images.dtype == np.uint8:
        return images
    values = np.nan_to_num(images, posinf=0, neginf=0)
    least, largest = np.quantile(values, [0.01, 0.99]) if values.size else (0, 1)
    share = (values - least) / max(largest - least, 1e-30)
    return (255 * np.clip(share, 0, 1)).round().astype(np.uint8)[..., None]


def samples_grid(
    images: Num[np.ndarray, "N *X"], label: Int[np.ndarray, "N"] | None
) -> UInt8[np.ndarray, "GH GW 3"]:
    """Samples, a row a class if there are few classes."""
    return grid(shown(images), rows_by_class(label, len(images)))


def strips(images: Num[np.ndarray, "R K ..."]) -> UInt8[np.ndarray, "GH GW 3"]:
    """Rows of as many images each."""
    images = shown(images)
    numbers = np.arange(images.shape[0] * images.shape[1]).reshape(images.shape[:2])
    return grid(np.concatenate(images), list(numbers))


def save_png(path: AnyPath, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a picture, on the first process; a reader never sees half of it."""
    if hosts.is_first():
        with write_atomically(path) as file:
            Image.fromarray(picture).save(file, format="png")


def save_gif(path: AnyPath, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> None:
    """Write an animation that stands still on its last frame, on the first process."""
    if not hosts.is_first():
        return
    first, *others = [Image.fromarray(frame) for frame in frames]
    durations = [FRAME] * len(others) + [10 * FRAME]
    with write_atomically(path) as file:
        first.save(file, "gif", save_all=True, append_images=others, duration=durations, loop=0)


def read_pictures(paths: Sequence[str], shape: Shape) -> UInt8[np.ndarray, "N H W C"]:
    """Picture files as images of this (H, W, C).

    Raises:
        UsageError: on a file that is no picture, or one of another size; or for a flow of arrays.
    """
    if is_arrays(shape):
        raise UsageError("images are given, but this flow is of arrays; leave them out")
    height, width, channels = shape
    images = []
    for path in paths:
        try:
            with as_path(path).open("rb") as file:
                picture = Image.open(file).convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise UsageError(f"images has {path}, not a readable picture ({error})") from error
        if picture.size != (width, height):
            raise UsageError(
                f"images has {path} of {picture.size[0]}x{picture.size[1]} pixels; this flow "
                f"needs {width}x{height}: scale or crop it"
            )
        images.append(np.asarray(picture).reshape(shape))
    return np.stack(images)
