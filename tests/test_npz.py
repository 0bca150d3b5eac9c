"""Files of arrays: what is needed of them is read, and what is wrong with them said in one line."""

import io
import json
import pickle
import struct
import zipfile
import zlib

import memory
import numpy as np
import pytest
import small_network

from jetflow.archive import read_images
from jetflow.evals import features, inception
from jetflow.npz import Npz
from jetflow.types import UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
DATA = {"name": "a", "version": "1", "split": "train", "resize": "none", "checksum": "0"}


@pytest.fixture(scope="module", autouse=True)
def small():
    """The small network for the FID's own."""
    with pytest.MonkeyPatch.context() as patch:
        small_network.install(patch)
        yield


# Files as no library writes them.


def npy(shape="(20, 8, 8, 1)", descr="'|u1'", *, version=1, order="False", content=b"") -> bytes:
    """An array of a description and a content that need not fit."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + size + text + content


def array(values) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(values), allow_pickle=True)
    return file.getvalue()


def zipped(compression=zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def bomb(name: str, shape: str, descr: str, size: int, **members: bytes) -> bytes:
    """An archive of some kB with an array that unpacks to `size` bytes, all zero."""
    packer, block = zlib.compressobj(wbits=-15), 2**24
    head = npy(shape, descr)
    raw = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    file = io.BytesIO(zipped(**members))
    with zipfile.ZipFile(file, "a") as archive:
        info = zipfile.ZipInfo(f"{name}.npy")
        archive.writestr(info, raw + zeros * (size // block) + packer.flush())
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, len(head) + size
    return file.getvalue()


def patched(position: int, value: int, *, directory=False) -> bytes:
    """Images in an archive with another byte at a position, of the file or of its directory."""
    raw = bytearray(zipped(images=array(IMAGES)))
    raw[position + (raw.find(b"PK\x01\x02") if directory else 0)] = value
    return bytes(raw)


def images(**members) -> bytes:
    return zipped(images=array(IMAGES), **{name: array(values) for name, values in members.items()})


def moments(**members) -> bytes:
    """A reference, with some of its arrays replaced."""
    arrays = {"mu": np.zeros(48), "sigma": np.eye(48), "features": np.zeros((9, 48), np.float32)}
    arrays |= {"facts": json.dumps({"data": DATA, "images": 9})} | members
    return zipped(**{
        name: values if isinstance(values, bytes) else array(values)
        for name, values in arrays.items()
    })  # fmt: skip


class Harm:
    """Ends the test in an error if it is ever unpickled."""

    def __reduce__(self):
        return divmod, (1, 0)


HARM = array(np.array([Harm()] * 20, dtype=object))

# name -> a file, words of the message; of both kinds of file where images are wanted.
NO_IMAGES = {
    "nothing": (lambda: b"", "not a zip file"),
    "text": (lambda: b"text" * 99, "not a zip file"),
    "one array": (lambda: array(IMAGES), "not a zip file"),
    "pickle": (lambda: pickle.dumps(3), "not a zip file"),
    "half a file": (lambda: images()[:600], "not a zip file"),
    "no array": (lambda: zipped(images=b"hello"), "images"),
    "other arrays": (lambda: zipped(a=array(IMAGES)), "it has no images"),
    "version 3": (lambda: zipped(images=npy(version=3, content=bytes(1280))), "version (3, 0)"),
    "version 9": (lambda: zipped(images=npy(version=9)), "version (9, 0)"),
    "code": (lambda: zipped(images=npy("__import__('os').abort()")), "malformed"),
    "deep header": (lambda: zipped(images=npy("(" * 9000)), "images"),
    "long header": (lambda: zipped(images=npy(version=2) + b" " * 2**20), "images"),
    "claim": (lambda: zipped(images=npy("(1000000000000, 8, 8, 3)")), "[1000000000000, 8, 8, 3]"),
    "cut short": (lambda: zipped(images=npy(content=bytes(500))), "[20, 8, 8, 1]"),
    "too long": (lambda: zipped(images=npy(content=bytes(1281))), "[20, 8, 8, 1]"),
    "negative": (lambda: zipped(images=npy("(-5, 8, 8, 3)")), "[-5, 8, 8, 3]"),
    "no image": (lambda: zipped(images=npy("(0, 8, 8, 1)")), "[0, 8, 8, 1]"),
    "no pixels": (lambda: zipped(images=npy("(5, 0, 8, 3)")), "[5, 0, 8, 3]"),
    "no channels": (lambda: zipped(images=array(IMAGES[..., 0])), "[20, 8, 8]"),
    "four channels": (lambda: zipped(images=array(IMAGES.repeat(4, 3))), "[20, 8, 8, 4]"),
    "floats": (lambda: zipped(images=array(IMAGES / 255)), "float64"),
    "objects": (lambda: zipped(images=HARM), "object"),
    "columns first": (lambda: zipped(images=array(np.asfortranarray(IMAGES))), "rows"),
    "flipped bit": (lambda: patched(200, 0), "images"),
    "unknown compression": (lambda: patched(10, 99, directory=True), "method 99"),
    "bzip2": (lambda: zipped(zipfile.ZIP_BZIP2, images=array(IMAGES)), "method 12"),
    "encrypted": (lambda: patched(8, 1, directory=True), "encrypted"),
    "large images": (
        lambda: bomb("images", "(2, 32768, 32768, 3)", "'|u1'", 6 * 2**30),
        "memory",
    ),
    "many images": (lambda: bomb("images", "(2147483648, 1, 1, 1)", "'|u1'", 2**31), "memory"),
    "finite of others": (lambda: images(finite=np.ones(3, bool)), "bool [3], not bool [20]"),
    "finite by pixel": (lambda: images(finite=np.ones((20, 20), bool)), "bool [20, 20]"),
    "finite objects": (lambda: zipped(images=array(IMAGES), finite=HARM), "object"),
    "finite claim": (
        lambda: zipped(images=array(IMAGES), finite=npy("(1000000000000000,)", "'|b1'")),
        "[1000000000000000]",
    ),
    "finite bomb": (
        lambda: bomb("finite", "(2147483648,)", "'|b1'", 2**31, images=array(IMAGES)),
        "[2147483648]",
    ),
}
NO_REFERENCE = {
    "mu of others": (lambda: moments(mu=np.zeros(3)), "float64 [3]"),
    "mu in rows": (lambda: moments(mu=np.zeros((48, 1))), "[48, 1]"),
    "mu bomb": (
        lambda: bomb("mu", "(268435456,)", "'<f8'", 2**31, sigma=array(np.eye(48))),
        "[268435456]",
    ),
    "mu objects": (lambda: moments(mu=HARM), "object"),
    "mu of text": (lambda: moments(mu=np.full(48, "a")), "<U1"),
    "mu of nan": (lambda: moments(mu=np.full(48, np.nan)), "mu is not finite"),
    "sigma infinite": (lambda: moments(sigma=np.full((48, 48), np.inf)), "sigma is not finite"),
    "features of others": (lambda: moments(features=np.zeros((9, 7))), "[9, 7]"),
    "features bomb": (
        lambda: bomb("features", "(11184810, 48)", "'<f4'", 2**31, mu=array(np.zeros(48)),
                     sigma=array(np.eye(48))),
        "features",
    ),
    "no facts": (lambda: moments(facts="{"), "facts"),
    "a list of facts": (lambda: moments(facts="[1]"), "facts"),
    "text for a network": (lambda: moments(facts='{"network": "x"}'), "facts"),
    "another network": (
        lambda: moments(facts=json.dumps({"network": {"resize": "\n" * 10**6}})),
        "resize",
    ),
    "facts of no data": (lambda: moments(facts='{"data": {"name": "a"}}'), "facts"),
    "facts of data alone": (lambda: moments(facts=json.dumps({"data": DATA})), "facts"),
    "facts of no number": (lambda: moments(facts='{"images": "many"}'), "facts"),
    "facts of a gigabyte": (lambda: moments(facts=npy("()", "'<U268435456'")), "facts"),
    "facts of bytes": (lambda: moments(facts=np.array(b"{}")), "facts"),
}  # fmt: skip


def read_reference(path, *, images=True):
    network = small_network.network(inception.PUBLISHED)

    def measure(given):
        assert sum(map(len, given.chunks)) == given.num
        return small_network.collected(8)

    return features.read_reference(path, network, measure, chunk=8, images=images)


def read_samples(path):
    found = read_images(Npz(path, "samples", "images"), 128)
    return found, np.concatenate([*found.chunks])


@pytest.mark.parametrize(
    ("read", "make", "words"),
    [pytest.param(read_samples, *row, id=f"samples: {name}") for name, row in NO_IMAGES.items()]
    + [
        pytest.param(read_reference, *row, id=f"reference: {name}")
        for name, row in NO_REFERENCE.items()
    ],
)
def test_refused(read, make, words, tmp_path):
    path = tmp_path / "refused.npz"
    path.write_bytes(make())
    with pytest.raises(UsageError) as error, memory.bounded():
        read(path)
    message = str(error.value)
    assert "refused.npz" in message and words in message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("read", [read_samples, read_reference])
def test_no_file(read, tmp_path):
    for path in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(UsageError, match="it is no file"):
            read(path)


def test_only_what_is_needed_is_read(tmp_path):
    """Whatever else there is, and however large."""
    path, members = tmp_path / "a.npz", {"mu": array(np.zeros(48)), "sigma": array(np.eye(48))}
    for name in ("features", "labels", "images"):
        path.write_bytes(bomb(name, "(2147483648,)", "'|u1'", 2**31, **members))
        with memory.bounded():
            assert set(read_reference(path, images=False).parts) == {"pooled"}
    path.write_bytes(bomb("labels", "(2147483648,)", "'|u1'", 2**31, images=array(IMAGES)))
    with memory.bounded():
        np.testing.assert_array_equal(read_samples(path)[1], IMAGES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["images", "arr_0"])
def test_images_come_in_chunks(save, name, tmp_path):
    save(tmp_path / "a.npz", **{name: IMAGES}, finite=np.arange(20) > 2, labels=np.zeros(20))
    num, not_finite, chunks = read_images(Npz(tmp_path / "a.npz", "samples", "images"), 8)
    chunks = list(chunks)
    assert (num, not_finite) == (20, 3) and [len(chunk) for chunk in chunks] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(chunks), IMAGES)


@pytest.mark.parametrize("dtype", [">f4", "<i8", "U3", np.float16, bool])
@pytest.mark.parametrize("order", "CF")
def test_arrays_are_read_as_numpy_reads_them(dtype, order, tmp_path):
    expected = np.arange(12).reshape(3, 4).astype(dtype, order=order)
    np.savez(tmp_path / "a.npz", a=expected)
    actual = Npz(tmp_path / "a.npz", "file", "an array").array("a")
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
