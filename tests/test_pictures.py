"""Grids of samples, and the files of pictures."""

import numpy as np
import pytest
from PIL import Image

from jetflow import pictures
from jetflow.pictures import LONGEST_SIDE, PADDING, labels_in_turn, rows_by_class
from jetflow.types import UsageError


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_its_place(channels):
    values = (10, 20, 30)
    images = np.stack([np.full((4, 6, channels), value, np.uint8) for value in values])
    grid = pictures.grid(images, [np.array([0, 2]), np.array([1])])
    factor = 512 // (2 * (4 + PADDING) + PADDING)
    small = grid[::factor, ::factor]
    assert (grid == small.repeat(factor, axis=0).repeat(factor, axis=1)).all()
    for value, (row, column) in zip(values, ((0, 0), (1, 0), (0, 1)), strict=True):
        top, left = PADDING + row * (4 + PADDING), PADDING + column * (6 + PADDING)
        assert (small[top : top + 4, left : left + 6] == value).all()
        small[top : top + 4, left : left + 6] = 255
    assert (small == 255).all()


@pytest.mark.parametrize(
    ("num", "classes", "lengths"),
    [
        (20, 10, [2] * 10),
        (13, 5, [3, 3, 3, 2, 2]),
        (7, 0, [3, 3, 1]),
        (64, 2, [8] * 8),  # rows of 32 would be strips
        (400, 10, [20] * 20),
        (64, 1000, [8] * 8),
        (12, 10, [4, 4, 4]),
    ],
)
def test_rows(num, classes, lengths):
    """Each image is shown once; a row is of one class, if classes are few."""
    label = labels_in_turn(num, classes)
    rows = rows_by_class(label, num)
    assert [len(row) for row in rows] == lengths
    assert sorted(np.concatenate(rows)) == list(range(num))
    if label is not None:
        assert list(label) == [i % classes for i in range(num)]
        if classes <= num // 2:
            of_rows = [set(label[row]) for row in rows]
            assert all(len(labels) == 1 for labels in of_rows)
            assert of_rows == sorted(of_rows, key=min)


def test_small_images_make_no_huge_picture():
    assert max(pictures.strips(np.zeros((1, 32, 8, 8, 1), np.uint8)).shape) <= LONGEST_SIDE
    large = np.random.default_rng(0).integers(0, 256, (1, 600, 600, 3)).astype(np.uint8)
    assert (pictures.samples_grid(large, None)[PADDING:-PADDING, PADDING:-PADDING] == large).all()


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.png"
    for content, message in (("no picture", "not a readable picture"), (None, "of 5x4 pixels")):
        if content:
            path.write_text(content)
        else:
            pictures.save_png(path, np.zeros((4, 5, 3), np.uint8))
        with pytest.raises(UsageError, match=message):
            pictures.read_pictures([str(path)], (4, 4, 3))
    image = pictures.read_pictures([str(path)], (4, 5, 3))
    np.testing.assert_array_equal(image, np.zeros((1, 4, 5, 3)))


def test_an_animation_stands_still_at_its_end(tmp_path):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 200)]
    pictures.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 3
        picture.seek(2)
        assert picture.info["duration"] > 1000
