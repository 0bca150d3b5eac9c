"""How samples are laid out in a picture: one row a class, or about square."""

import numpy as np
from jaxtyping import Int

MOST_ROWS = 20  # of a picture that a person takes in


def rows_by_class(num: int, num_classes: int) -> tuple[Int[np.ndarray, "N"] | None, list[int]]:
    """Labels for `num` images, as evenly as it goes, and how many images each row of a grid has.

    Without classes there are no labels, and the grid is about square; with many, or few images of
    each, it is so too.
    """
    if not num_classes:
        return None, square_rows(num)
    if num < 2 * num_classes or num_classes > MOST_ROWS:
        return (np.arange(num) * num_classes // num).astype(np.int32), square_rows(num)
    parts = np.array_split(np.arange(num), num_classes)
    labels = np.repeat(np.arange(num_classes), [len(part) for part in parts])
    return labels.astype(np.int32), [len(part) for part in parts if len(part)]


def square_rows(num: int) -> list[int]:
    """The rows of a grid of `num` images that is about square."""
    columns = int(np.ceil(np.sqrt(num)))
    return [min(columns, num - start) for start in range(0, num, columns)]


def corner(rows: list[int]) -> tuple[Int[np.ndarray, "K"], list[int]]:
    """The images in the first `MOST_ROWS` rows and columns of a grid, by number, and its rows."""
    starts = np.cumsum([0, *rows[:-1]])
    shown = [min(count, MOST_ROWS) for count in rows[:MOST_ROWS]]
    numbers = [start + np.arange(count) for start, count in zip(starts, shown, strict=False)]
    return np.concatenate(numbers), shown
