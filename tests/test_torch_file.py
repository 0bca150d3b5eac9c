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

from jetflow.tools.convert import torch_file, torch_writer
from jetflow.types import UsageError

PTH = GOLDEN / "tarflow"
LEGACY = PTH / "uncond_vp.legacy.pth"


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
    pickles = [_Pickler.dumps(value) for value in (torch_file.LEGACY_MAGIC, 1001, system)]
    pickles += [content if isinstance(content, bytes) else _Pickler.dumps(content)]
    raw = b"".join([*pickles, _Pickler.dumps([key])])
    path.write_bytes(raw + (4).to_bytes(8, "little") + FLOATS["0"])
    return path


FORMS = {"zip": zip_file, "legacy": legacy_file}
FLOATS = {"0": np.arange(1, 5, dtype="<f4").tobytes()}


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


# What is read.


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("FloatStorage", np.float32), ("DoubleStorage", np.float64), ("HalfStorage", np.float16),
     ("BFloat16Storage", jnp.bfloat16), ("LongStorage", np.int64)],
)  # fmt: skip
def test_types_and_strides(kind, dtype, tmp_path):
    """A transposed view with an offset, and a second tensor on the same storage."""
    values = np.arange(8).astype(dtype)
    content = {
        "transposed": stored(kind, (3, 2), (1, 3), offset=1, count=8),
        "shared": stored(kind, (8,), (1,), count=8),
        "scalar": stored(kind, (), (), offset=5, count=8),
        "empty": stored(kind, (0, 4), (4, 1), count=8),
    }
    read = torch_file.read(zip_file(tmp_path / "a.pth", content, {"0": values.tobytes()}))
    assert list(read) == list(content)
    expected = {
        "transposed": values[1:7].reshape(2, 3).T,
        "shared": values,
        "scalar": values[5],
        "empty": np.empty((0, 4), dtype),
    }
    assert_equal(read, expected)


def test_writer_keeps_types(tmp_path):
    dtypes = (np.float32, np.float64, np.float16, jnp.bfloat16, np.int64, np.bool_)
    tensors = {np.dtype(dtype).name: np.arange(6).astype(dtype).reshape(2, 3) for dtype in dtypes}
    tensors["scalar"] = np.asarray(1.5, np.float32)
    torch_writer.write(tmp_path / "a.pth", tensors)
    assert_equal(torch_file.read(tmp_path / "a.pth"), tensors)


def test_numbers_of_the_other_byte_order(tmp_path):
    """A machine of either order reads files of both."""
    content, values = {"a": stored()}, np.arange(1, 5, dtype=np.float32)
    storages = {order: {"0": values.astype(code).tobytes()} for order, code in
                (("little", "<f4"), ("big", ">f4"))}  # fmt: skip
    for order, raw in storages.items():
        path = zip_file(tmp_path / f"{order}.pth", content, raw, order=order)
        assert_equal(torch_file.read(path), {"a": values})
    swapped = torch_file.read(legacy_file(tmp_path / "a.pth", content, little_endian=False))
    assert_equal(swapped, {"a": values.byteswap()})
    with pytest.raises(UsageError, match="has the byte order 'middle'; expected little or big"):
        torch_file.read(zip_file(tmp_path / "a.pth", content, order="middle"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_of_every_protocol(protocol, tmp_path):
    """As far as `torch.save(pickle_protocol=…)` may use them; none of them is a state dict."""
    content = {"a": [1, -(2**40), 0.5, True, None, (), (1, 2, 3, "é")], "b": {"c": ("d",)}}
    path = zip_file(tmp_path / "a.pth", pickle.dumps(content, protocol))
    reason = (
        r"needs (LIST|DICT)" if protocol == 0 else r"holds more than tensors: 'a' \(list\), 'b'"
    )
    with pytest.raises(UsageError, match=reason):
        torch_file.read(path)


# What a file may not ask for.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "harm",
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
     ("subprocess", "Popen"), ("torch", "load"), ("torch.serialization", "os.system"),
     ("collections", "namedtuple"), ("torch._utils", "__builtins__"), ("o\\x1bs", "system")],
)  # fmt: skip
def test_other_objects_are_refused_unexecuted(harm, form, tmp_path):
    """Before the tensors and after them; the command would leave a file."""
    mark = tmp_path / "executed"
    command = f"__import__('os').system('touch {mark}')" if "eval" in harm else f"touch {mark}"
    for content in (
        {"a": _Called(_Global(*harm), command), "b": stored()},
        {"b": stored(), "a": _Called(_Global(*harm), command)},
        {"b": stored(), "a": _Global(*harm)},
    ):
        path = FORMS[form](tmp_path / "harm.pth", content)
        with pytest.raises(UsageError) as error:
            torch_file.read(path)
        named = repr(".".join(harm)).replace("\\\\", "\\")
        assert f"harm.pth asks for {named}; refused, nothing was executed" in str(error.value)
        assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_python_are_refused_by_name(protocol, tmp_path):
    path = zip_file(tmp_path / "a.pth", pickle.dumps({"a": zipfile.ZipFile}, protocol))
    with pytest.raises(UsageError, match=r"asks for 'zipfile\.ZipFile'; refused|needs DICT"):
        torch_file.read(path)


def test_file_is_a_real_danger(tmp_path):
    """The same file executes its command where everything is admitted."""
    mark = tmp_path / "executed"
    content = {"a": _Called(_Global(os.system.__module__, "system"), f"touch {mark}")}
    pickle.loads(_Pickler.dumps(content))
    assert mark.exists()


@pytest.mark.parametrize("state", [{"_function": 1}, (None, {"_function": 1})])
@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "collections OrderedDict"])
def test_admitted_functions_cannot_be_altered(name, state, tmp_path):
    before = torch_file.read(PTH / "uncond.pth")
    module, function = name.split()
    raw = _Pickler.dumps({"a": _Global(module, function)})
    state = pickle.dumps(state, protocol=2)[2:-1]
    place = raw.index(f"{function}\n".encode()) + len(function) + 1
    path = zip_file(tmp_path / "alters.pth", raw[:place] + state + pickle.BUILD + raw[place:])
    with pytest.raises(UsageError, match=r"alters\.pth alters a function; refused"):
        torch_file.read(path)
    assert_equal(torch_file.read(PTH / "uncond.pth"), before)


def nested(opener: bytes, depth: int = 300_000) -> bytes:
    """A dict whose key is nested in tuples so deep that to hash it would end the process."""
    return b"\x80\x02}" + opener + b"\x85" * depth + b"K\x01s."


# What would end the process in Python's own machine, or take gigabytes, or for ever; and what no
# state dict does.
ATTACKS = {
    "deep key": (nested(b")"), "sets an item of a dict for a tuple"),
    "deep key of a list": (nested(b"]"), "sets an item of a dict for a tuple"),
    "deep reference": (b"\x80\x02)" + b"\x85" * 100_000 + b"Q.", "refers to something that is"),
    "doubled reference": (b"\x80\x02)" + b"q\x00h\x00\x86" * 100 + b"Q.", "refers to something"),
    "memo": (b"\x80\x02)r\x00\x00\x00\x10.", "holds one tuple"),  # 2**28
    "long text": (b"\x80\x02X\xff\xff\xff\xff.", "no readable PyTorch file"),  # of 4 GB
    "no name": (b"\x80\x04)" + b"\x85" * 100_000 + b")\x93.", "asks for an object without a name"),
    "object": (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "needs NEWOBJ, which no state dict does"),
    "call of a type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls a .*; refused"),
    "call of a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls a str; refused"),
    "append to a dict": (b"\x80\x02}K\x01a.", "appends to a dict"),
    "empty stack": (b"\x80\x02\x85.", "no readable PyTorch file"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_in_an_error(name, form, tmp_path):
    raw, said = ATTACKS[name]
    path = FORMS[form](tmp_path / "attack.pth", raw)
    with pytest.raises(UsageError, match=rf"attack\.pth .*{said}"):
        torch_file.read(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (stored(shape=(5,), count=4), "'a' reaches out of its storage"),
        (stored(shape=(2,), offset=3, count=4, strides=(1,)), "'a' reaches out of its storage"),
        (stored(shape=(2, 2), strides=(3, 1), count=4), "'a' reaches out of its storage"),
        (stored(strides=(-1,), offset=3), "'a' reaches out of its storage"),
        (stored(shape=(2,), offset=-1, count=4), "'a' reaches out of its storage"),
        (stored(shape=(8,)), "the storage of 'a' is cut short"),
        (stored(count=-4), "the storage of 'a' is cut short"),
        (stored(shape=(-1,), count=4), "'a' reaches out of its storage"),
        (stored(shape=(2,), strides=(1, 1), count=4), r"the shape of 'a' is \(2,\)"),
        (stored(shape=("x",), count=4), "'a' has no proper shape"),
        (stored(shape=(2**70,), count=4), "'a' has no proper shape"),
        (
            stored(shape=(2**40,), strides=(0,), count=4),
            "tensors far larger than itself, up to 'a'",
        ),
        (stored(key="1"), "is damaged: it has no storage 'archive/data/1'"),
        (stored("StrangeStorage"), r"asks for 'torch\.StrangeStorage'"),
        (_Called(_Global("torch._utils", "_rebuild_tensor"), 3, 0, (), ()), "'a' has no storage"),
        (3, r"holds more than tensors: 'a' \(int\)"),
        ({"b": 3}, r"holds more than tensors: 'a' \(dict\)"),
    ],
)
def test_what_does_not_hold_together_is_refused(tensor, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        torch_file.read(zip_file(tmp_path / "a.pth", {"a": tensor}))


def test_tensors_share_one_allowance_for_repeated_elements(tmp_path, monkeypatch):
    """Each of them may exceed the file, not all of them together."""
    monkeypatch.setattr(torch_file, "ROOM", 2**20)
    repeated = stored(shape=(2**17,), strides=(0,), count=4)  # of half a MB
    content = {name: repeated for name in "ab"}
    assert torch_file.read(zip_file(tmp_path / "a.pth", content))["b"].nbytes == 2**19
    with pytest.raises(UsageError, match="far larger than itself, up to 'c'"):
        torch_file.read(zip_file(tmp_path / "a.pth", content | {"c": repeated, "d": repeated}))


def test_storage_described_in_two_ways_is_refused(tmp_path):
    for other in (stored("IntStorage"), stored(shape=(2,), count=2)):
        with pytest.raises(UsageError, match="the storage of 'b' is described in two ways"):
            torch_file.read(zip_file(tmp_path / "a.pth", {"a": stored(), "b": other}))


def test_compressed_file_is_refused(tmp_path):
    path = zip_file(tmp_path / "a.pth", {"a": stored()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(
        UsageError, match=r"a\.pth is a compressed zip file.* zip it|zip the folder"
    ):
        torch_file.read(path)


def test_unknown_storage_of_the_legacy_format_is_refused(tmp_path):
    for key in ("1", 1, [((),)]):
        with pytest.raises(UsageError, match="is damaged: a storage has 4 elements"):
            torch_file.read(legacy_file(tmp_path / "a.pth", {"a": stored()}, key=key))


@pytest.mark.parametrize("raw", [b"", b"\x80", b"PK\x03\x04", b"text", pickle.dumps(3)])
@pytest.mark.parametrize("end", [b"", b"." * 100])
def test_other_files_are_refused(raw, end, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(raw + end)
    with pytest.raises(UsageError, match=r"other\.pth"):
        torch_file.read(path)


@pytest.mark.parametrize("source", [PTH / "uncond.pth", LEGACY])
def test_files_cut_short_are_refused(source, tmp_path):
    raw = source.read_bytes()
    for share in (0.01, 0.3, 0.999):
        (tmp_path / "short.pth").write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(UsageError, match=r"short\.pth"):
            torch_file.read(tmp_path / "short.pth")
