"""Images streamed to an .npz: in constant memory, and going on after a kill."""

import numpy as np
import pytest

from jetflow.archive import Archive
from jetflow.types import UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
FINITE = np.array([True, False, True, False, True, True, True])


def archive(path, num=7, **settings) -> Archive:
    return Archive(path, num=num, image_shape=(4, 4, 3), settings={"seed": 0, **settings})


def test_what_was_appended_is_there(tmp_path):
    path = tmp_path / "some" / "images.npz"
    whole = archive(path)
    whole.append(IMAGES[:4], FINITE[:4])
    whole.append(IMAGES[4:], FINITE[4:])
    np.testing.assert_array_equal(whole.first(np.array([0, 6])), IMAGES[[0, 6]])
    whole.finish(np.arange(7))
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], IMAGES)
        np.testing.assert_array_equal(arrays["labels"], np.arange(7))
    assert [p.name for p in path.parent.iterdir()] == ["images.npz"]


def test_it_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "images"  # a name without suffix stays as it is
    first = archive(path)
    first.append(IMAGES[:3], FINITE[:3])
    first.append(IMAGES[3:4], FINITE[3:4])
    del first  # as after a kill
    second = archive(path)
    assert second.done == 4
    np.testing.assert_array_equal(second.finite, FINITE[:4])
    second.append(IMAGES[4:], FINITE[4:])
    second.finish(None)
    with np.load(path) as arrays:
        assert arrays.files == ["images", "finite"]
        np.testing.assert_array_equal(arrays["finite"], FINITE)
        np.testing.assert_array_equal(arrays["images"], IMAGES)
    assert archive(path).done == 0


def test_half_a_batch_is_made_again(tmp_path):
    """A kill between the images and the note of them."""
    path = tmp_path / "images.npz"
    first = archive(path)
    first.append(IMAGES[:2], FINITE[:2])
    first._images[2:4] = 7
    first._images.flush()
    again = archive(path)
    assert again.done == 2
    again.append(IMAGES[2:], FINITE[2:])
    np.testing.assert_array_equal(again.first(np.arange(7)), IMAGES)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"num": 8}, {"guidance": 1.0}])
def test_images_of_other_settings_are_not_mixed(tmp_path, changed):
    path = tmp_path / "images.npz"
    archive(path).append(IMAGES[:2], FINITE[:2])
    message = f"images.npz.partial holds 2 images of another sampling .{next(iter(changed))} differ"
    with pytest.raises(UsageError, match=message):
        archive(path, **changed)
    if "guidance" in changed:  # also the other way round
        archive(path.with_name("guided"), **changed).append(IMAGES[:2], FINITE[:2])
        with pytest.raises(UsageError, match=r"\(guidance differ\)"):
            archive(path.with_name("guided"))
    assert archive(path).done == 2
