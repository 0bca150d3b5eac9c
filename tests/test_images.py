"""Image files of every kind, made into pixels by stated rules."""

import struct
import zlib

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


def png(pixels, colour, transparent):
    """A PNG of 16 bits with a transparent value, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
        if data or kind == b"IEND"
    )


@pytest.mark.parametrize(
    ("transparent", "first"), [(b"", 0x12), (b"\x12\x34", 255), (b"\x12\x35", 0x12)]
)
def test_of_16_bits_the_high_byte_is_kept_and_transparent_is_white(transparent, first):
    values = np.array([[0x1234, 0, 255, 256, 0xFFFF]], np.uint16)
    pixels = np.asarray(decode(png(values, 0, transparent)))
    assert pixels[0, :, 1].tolist() == [first, 0, 0, 1, 255]
    colours = np.stack([values, values // 2, values // 3], -1)
    high = colours[0, 0].astype(">u2").tobytes() if transparent == b"\x12\x34" else b""
    assert np.asarray(decode(png(colours, 2, high)))[0, 0, 0] == (255 if high else 0x12)


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


def exif(*entries, data=b""):
    """EXIF of (tag, type, number of values, four bytes), with data behind them."""
    fields = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + data


TURNED = (0x112, 3, 1, b"\6\0\0\0")
BEHIND = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # where the data of two entries lies
EXIF = {
    "sound": exif(TURNED),
    "a resolution of 0/0": exif(TURNED, (0x11A, 5, 1, BEHIND), data=bytes(8)),
    "two resolutions": exif(TURNED, (0x11A, 5, 2, BEHIND), data=struct.pack("<4I", 7, 1, 7, 1)),
    "a number as text": exif((0x10F, 3, 1, b"M\0\0\0"), TURNED),
    "an unknown type": exif((0x10F, 99, 1, b"M\0\0\0"), TURNED),
    "a negative exposure": exif(TURNED, (0x9204, 10, 1, BEHIND), data=struct.pack("<ii", -1, 0)),
    "nothing behind": exif(TURNED, (0x11A, 5, 1, BEHIND)),
}
UNTURNED = {
    "an orientation as text": exif((0x112, 2, 2, b"6\0\0\0")),
    "an unknown orientation": exif((0x112, 3, 1, b"\x63\0\0\0")),
    "no TIFF": b"Exif\0\0\0\x08\0\x02" + bytes(20),
    "empty": b"Exif\0\0",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [*EXIF, *UNTURNED])
def test_odd_metadata_costs_no_pixels(kind):
    content = (EXIF | UNTURNED)[kind]
    plain = archives.jpeg(1)
    length = struct.pack(">H", len(content) + 2)
    turned = decode(plain[:2] + b"\xff\xe1" + length + content + plain[2:])
    expected = np.rot90(np.asarray(decode(plain)), -1 if kind in EXIF else 0)
    np.testing.assert_array_equal(np.asarray(turned), expected)


def test_the_limit_of_pixels_is_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which Pillow allows twice as many
    content = archives.jpeg(1, 80, 60)
    with images.large_files():
        assert decode(content).size == (80, 60)
        with pytest.raises(Unreadable, match=r"4,800 pixels.*--max_pixels is 4,799"):
            decode(content, max_pixels=4799)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", archives.unreadable(1))
def test_what_is_no_image_is_refused_with_a_reason(kind):
    with pytest.raises(Unreadable) as error:
        decode(archives.unreadable(1)[kind])
    assert str(error.value) and "0x" not in str(error.value)


def test_floating_point_is_refused():
    with pytest.raises(Unreadable, match="floating"):
        decode(archives.encoded(Image.new("F", (4, 4)), "TIFF"))


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
