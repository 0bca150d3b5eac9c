"""Image files of every kind, made into pixels by stated rules."""

import archives
import numpy as np
import pytest
from PIL import Image, ImageOps

from jetflow.data import images
from jetflow.data.images import Unreadable, decode, resize

PICTURE = archives.picture(1, 80, 60)


@pytest.mark.parametrize("kind", archives.awkward(1))
def test_every_kind_becomes_rgb(kind):
    image = decode(archives.awkward(1)[kind])
    assert image.mode == "RGB"
    size = {"rotated": (60, 80), "small": (20, 17)}.get(kind, (80, 60))
    assert image.size == size
    expected = np.asarray(Image.fromarray(PICTURE), float)
    if kind in ("grey", "16-bit"):
        grey = np.asarray(Image.fromarray(PICTURE).convert("L"), float)
        expected = np.repeat(grey[..., None], 3, axis=2)
    if kind == "rotated":
        expected = np.rot90(expected, -1)
    if kind == "small":
        expected = np.asarray(archives.picture(1, 20, 17), float)
    if kind == "palette":
        expected = np.asarray(Image.fromarray(PICTURE).quantize(16).convert("RGB"), float)
    error = abs(np.asarray(image, float) - expected).mean()
    assert error <= {"cmyk": 3, "grey": 3, "rotated": 3, "small": 6}.get(kind, 0)


def test_of_16_bits_the_high_byte_is_kept():
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    file = archives.encoded(Image.fromarray(values), "PNG")
    assert np.asarray(decode(file))[0, :, 0].tolist() == [0, 0, 1, 0x12, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    options = {}
    if mode == "P":  # a colour of the palette is transparent
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.putdata([0, 1])
        options = {"transparency": 0}
    pixels = np.asarray(decode(archives.encoded(image.convert(mode), "PNG", **options)))
    assert pixels[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("kind", archives.unreadable(1))
def test_what_is_no_image_is_refused_with_a_reason(kind):
    with pytest.raises(Unreadable) as error:
        decode(archives.unreadable(1)[kind])
    assert str(error.value) and "0x" not in str(error.value)


def test_floating_point_is_refused():
    with pytest.raises(Unreadable, match="floating"):
        decode(archives.encoded(Image.new("F", (4, 4)), "TIFF"))


def test_want_of_memory_is_no_fault_of_the_file(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(images, "_as_rgb", no_memory)
    with pytest.raises(MemoryError):
        decode(archives.jpeg(1))


@pytest.mark.parametrize(("width", "height"), [(12, 8), (8, 13), (16, 17)])
def test_resize_averages_over_the_centred_square(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    means = square.reshape(4, side // 4, 4, side // 4, 3).mean(axis=(1, 3))
    # Pillow rounds twice: after the rows and after the columns.
    assert abs(resize(Image.fromarray(pixels), 4) - means).max() <= 1


def test_resize_enlarges_smoothly_and_leaves_the_right_size_alone():
    image = Image.fromarray(archives.picture(3, 16, 16))
    np.testing.assert_array_equal(resize(image, 16), np.asarray(image))
    enlarged = resize(image, 40)
    np.testing.assert_array_equal(enlarged, image.resize((40, 40), Image.Resampling.BICUBIC))


def test_a_published_image_has_its_size():
    image = Image.new("RGB", (64, 63))
    with pytest.raises(Unreadable, match="64x63 pixels instead of 64x64"):
        images.exactly(image, 64)
    assert images.exactly(ImageOps.pad(image, (64, 64)), 64).shape == (64, 64, 3)
