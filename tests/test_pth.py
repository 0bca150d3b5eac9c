"""PyTorch's files in both formats, and files that ask for more than tensors."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from published import GOLDEN, assert_equal

from jetflow import pth
from jetflow.pth import read_pth, write_pth
from jetflow.types import UsageError

PTH = GOLDEN / "tarflow"
FLOATS = {"0": np.arange(1, 5, dtype="<f4").tobytes()}


# Files with any content, written as PyTorch does.


def zip_file(path: Path, content, storages=None, *, order="little", compression=0) -> Path:
    """In the zip format; `content` is pickled, or the pickle itself."""
    raw = content if isinstance(content, bytes) else _Pickler.dumps(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/byteorder", order)
        for key, values in (FLOATS if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", values)
    return path


def legacy_file(path: Path, content, *, little_endian=True, key="0") -> Path:
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    pickles = [_Pickler.dumps(value) for value in (pth.LEGACY_MAGIC, 1001, system)]
    pickles += [content if isinstance(content, bytes) else _Pickler.dumps(content)]
    raw = b"".join([*pickles, _Pickler.dumps([key])])
    path.write_bytes(raw + (4).to_bytes(8, "little") + FLOATS["0"])
    return path


FORMS = {"zip": zip_file, "legacy": legacy_file}


class _Global:
    """Any name of any module, whether it exists here or not."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Called:
    """`function(*arguments)`, to be called by whoever loads the pickle."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    """Writes tensors as PyTorch does, and whatever else is asked for."""

    def persistent_id(self, obj):
        return obj[1:] if type(obj) is tuple and obj[:1] == ("PERSISTENT",) else None

    def save(self, obj, **options):
        if isinstance(obj, _Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Called):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, **options)

    @classmethod
    def dumps(cls, content) -> bytes:
        buffer = io.BytesIO()
        cls(buffer, protocol=2).dump(content)
        return buffer.getvalue()


def stored(kind="FloatStorage", shape=(4,), strides=(1,), *, key="0", offset=0, count=None):
    """A tensor, as PyTorch pickles it."""
    count = count if count is not None else int(np.prod(shape))
    storage = ("PERSISTENT", "storage", _Global("torch", kind), key, "cpu", count)
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    return _Called(rebuild, storage, offset, shape, strides, False, OrderedDict())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16, np.int64])
def test_types_and_strides(dtype, tmp_path):
    """A transposed view with an offset, and a second tensor on the same storage."""
    values = np.arange(8).astype(dtype)
    kind = next(name for name, known in pth.DTYPES.items() if known == values.dtype)
    content = {
        "transposed": stored(kind, (3, 2), (1, 3), offset=1, count=8),
        "shared": stored(kind, (8,), (1,), count=8),
        "scalar": stored(kind, (), (), offset=5, count=8),
        "empty": stored(kind, (0, 4), (4, 1), count=8),
    }
    expected = {
        "transposed": values[1:7].reshape(2, 3).T,
        "shared": values,
        "scalar": values[5],
        "empty": np.empty((0, 4), dtype),
    }
    arrays = read_pth(zip_file(tmp_path / "a.pth", content, {"0": values.tobytes()}))
    assert list(arrays) == list(content)
    assert_equal(arrays, expected)


def test_writer_keeps_types(tmp_path):
    dtypes = (np.float32, np.float64, np.float16, jnp.bfloat16, np.int64, np.bool_)
    tensors = {np.dtype(dtype).name: np.arange(6).astype(dtype).reshape(2, 3) for dtype in dtypes}
    tensors["scalar"] = np.asarray(1.5, np.float32)
    write_pth(tmp_path / "a.pth", tensors)
    assert_equal(read_pth(tmp_path / "a.pth"), tensors)


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray(2, np.int64)}
    write_pth(tmp_path / "a.pth", tensors)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert_equal({name: tensor.numpy() for name, tensor in loaded.items()}, tensors)


def test_numbers_of_the_other_byte_order(tmp_path):
    content, values = {"a": stored()}, np.arange(1, 5, dtype=np.float32)
    path = zip_file(tmp_path / "a.pth", content, {"0": values.astype(">f4").tobytes()}, order="big")
    assert_equal(read_pth(path), {"a": values})
    swapped = read_pth(legacy_file(tmp_path / "a.pth", content, little_endian=False))
    assert_equal(swapped, {"a": values.byteswap()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "harm",
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "Popen"),
     ("torch", "load"), ("collections", "namedtuple"), ("torch._utils", "__builtins__")],
)  # fmt: skip
def test_other_objects_are_refused_unexecuted(harm, form, tmp_path):
    """The command would leave a file."""
    mark = tmp_path / "executed"
    command = f"__import__('os').system('touch {mark}')" if "eval" in harm else f"touch {mark}"
    for content in (
        {"a": _Called(_Global(*harm), command), "b": stored()},
        {"b": stored(), "a": _Global(*harm)},
    ):
        path = FORMS[form](tmp_path / "harm.pth", content)
        with pytest.raises(UsageError, match=r"harm\.pth asks for .*nothing was executed") as error:
            read_pth(path)
        assert repr(".".join(harm)) in str(error.value)
    assert not mark.exists()
    if harm == ("posix", "system"):  # the danger is real where everything is admitted
        pickle.loads(
            _Pickler.dumps({"a": _Called(_Global(os.system.__module__, "system"), command)})
        )
        assert mark.exists()


@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__call__": 1})])
@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "collections OrderedDict"])
def test_admitted_functions_cannot_be_altered(name, state, tmp_path):
    before = read_pth(PTH / "uncond.pth")
    module, function = name.split()
    raw = _Pickler.dumps({"a": _Global(module, function)})
    build = pickle.dumps(state, protocol=2)[2:-1] + pickle.BUILD
    place = raw.index(f"{function}\n".encode()) + len(function) + 1
    with pytest.raises(UsageError, match=r"alters\.pth"):
        read_pth(zip_file(tmp_path / "alters.pth", raw[:place] + build + raw[place:]))
    assert_equal(read_pth(PTH / "uncond.pth"), before)


# What would end the process, take gigabytes, or is no state dict.
ATTACKS = {
    "deep key": (b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", "far more than tensors"),
    "memo": (b"\x80\x02)r\x00\x00\x00\x10.", "far more than tensors"),  # 2**28
    "long text": (b"\x80\x02X\xff\xff\xff\xff.", "no readable PyTorch file"),  # of 4 GB
    "object": (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "needs NEWOBJ, which no state dict does"),
    "call of a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "no readable PyTorch file"),
    "reference": (b"\x80\x02)Q.", "refers to something that is not the storage"),
    "empty stack": (b"\x80\x02\x85.", "no readable PyTorch file"),
    "tuple": (b"\x80\x02).", "holds one tuple"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_in_an_error(name, form, tmp_path):
    raw, message = ATTACKS[name]
    with pytest.raises(UsageError, match=rf"attack\.pth .*{message}"):
        read_pth(FORMS[form](tmp_path / "attack.pth", raw))


def test_small_file_takes_little_memory(tmp_path):
    """A list of 300,000 values that 1,500 tensors name as their shape, in 365 kB."""
    shape = b"](" + b"N" * 300_000 + b"eq\x00"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR"
    path = zip_file(tmp_path / "a.pth", b"\x80\x02" + shape + b"0" + tensor * 1500 + b".")
    with pytest.raises(UsageError, match=r"a\.pth"):
        read_pth(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (stored(shape=(2, 2), strides=(3, 1), count=4), "'a' does not fit its storage"),
        (stored(shape=(2,), offset=3, count=4), "'a' does not fit its storage"),
        (stored(strides=(-1,), offset=3), "has no proper shape"),
        (stored(shape=(8,)), "the storage of 'a' is cut short"),
        (stored(count=-4), "refers to something"),
        (stored(shape=(2,), strides=(1, 1), count=4), "no proper storage or shape"),
        (stored(shape=(2**70,), count=4), "has no proper shape"),
        (
            stored(shape=(2**40,), strides=(0,), count=4),
            "tensors far larger than itself, up to 'a'",
        ),
        (stored(key="1"), "is damaged: it has no storage 'archive/data/1'"),
        (stored("StrangeStorage"), r"asks for 'torch\.StrangeStorage'"),
        (3, r"holds more than tensors: 'a' \(int\)"),
        ({"b": 3}, r"holds more than tensors: 'a' \(dict\)"),
    ],
)
def test_broken_tensor_is_refused(tensor, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_pth(zip_file(tmp_path / "a.pth", {"a": tensor}))


def test_storage_described_in_two_ways_is_refused(tmp_path):
    with pytest.raises(UsageError, match="'b' does not fit its storage"):
        read_pth(zip_file(tmp_path / "a.pth", {"a": stored(), "b": stored("IntStorage")}))


def test_compressed_file_is_refused(tmp_path):
    path = zip_file(tmp_path / "a.pth", {"a": stored()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match=r"a\.pth is a compressed zip file"):
        read_pth(path)


@pytest.mark.parametrize("raw", [b"", b"\x80", b"PK\x03\x04", b"text" * 30, pickle.dumps(3)])
def test_other_files_are_refused(raw, tmp_path):
    (tmp_path / "other.pth").write_bytes(raw)
    with pytest.raises(UsageError, match=r"other\.pth"):
        read_pth(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["uncond.pth", "uncond_vp.legacy.pth"])
def test_files_cut_short_are_refused(name, tmp_path):
    raw = (PTH / name).read_bytes()
    for share in (0.01, 0.3, 0.999):
        (tmp_path / "short.pth").write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(UsageError, match=r"short\.pth"):
            read_pth(tmp_path / "short.pth")
