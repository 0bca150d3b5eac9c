"""Images streamed to an .npz: in constant memory, and going on after a kill."""

import numpy as np
import pytest

from jetflow.archive import Archive
from jetflow.types import UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
FINITE = np.array([True, False, True, False, True, True, True])


def archive(path, num=7, **settings) -> Archive:
    rows = {"finite": ((), bool), "images": ((4, 4, 3), np.uint8)}
    return Archive(path, num=num, rows=rows, settings={"seed": 0, **settings})


def test_it_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "some" / "images"  # a name without suffix stays as it is
    first = archive(path)
    first.append(images=IMAGES[:3], finite=FINITE[:3])
    (path.with_name("images.partial") / "finite-00000003-00000005").write_bytes(b"\0\0")  # a kill
    second = archive(path)
    assert second.done == 3
    np.testing.assert_array_equal(second.first("finite"), FINITE[:3])
    second.append(images=IMAGES[3:], finite=FINITE[3:])
    np.testing.assert_array_equal(second.first("images", 5), IMAGES[:5])
    second.finish(np.arange(7))
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], IMAGES)
        np.testing.assert_array_equal(arrays["finite"], FINITE)
        np.testing.assert_array_equal(arrays["labels"], np.arange(7))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"num": 8}, {"guidance": 1.0}])
def test_images_of_other_settings_are_not_mixed(tmp_path, changed):
    path = tmp_path / "images.npz"
    archive(path).append(images=IMAGES[:2], finite=FINITE[:2])
    message = f"images.npz.partial holds 2 rows of other settings .{next(iter(changed))} is"
    with pytest.raises(UsageError, match=message):
        archive(path, **changed)
    assert archive(path).done == 2


def test_what_cannot_be_gone_on_with_is_begun_anew_and_said(tmp_path, caplog):
    """As version 0.1 left it: images, but no settings."""
    folder = tmp_path / "images.npz.partial"
    folder.mkdir()
    (folder / "images.npy").write_bytes(bytes(100))
    assert archive(tmp_path / "images.npz").done == 0
    assert not (folder / "images.npy").exists()
    assert str(folder) in caplog.text and "anew" in caplog.text
