"""PyTorch's files in both formats, and files that ask for more than tensors."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import memory
import numpy as np
import pytest
from published import GOLDEN, assert_equal

from jetflow import pth
from jetflow.pth import read_pth, write_pth
from jetflow.types import UsageError

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
    """Any name of any module, whether it exists or not."""

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


def stored(kind="FloatStorage", shape=(4,), strides=(1,), *, key="0", offset=0, count=4):
    """A tensor, as PyTorch pickles it."""
    storage = ("PERSISTENT", "storage", _Global("torch", kind), key, "cpu", count)
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    return _Called(rebuild, storage, offset, shape, strides, False, OrderedDict())


# What is read.


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("FloatStorage", np.float32), ("HalfStorage", np.float16), ("BFloat16Storage", jnp.bfloat16),
     ("LongStorage", np.int64)],
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
    expected = {
        "transposed": values[1:7].reshape(2, 3).T,
        "shared": values,
        "scalar": values[5],
        "empty": np.empty((0, 4), dtype),
    }
    tensors = read_pth(zip_file(tmp_path / "a.pth", content, {"0": values.tobytes()}))
    assert list(tensors) == list(content)
    assert_equal(tensors, expected)


def test_written_tensors_are_read_back(tmp_path):
    """By PyTorch too, where it is installed."""
    dtypes = (np.float32, np.float64, np.float16, jnp.bfloat16, np.int64, np.bool_)
    tensors = {np.dtype(dtype).name: np.arange(6).astype(dtype).reshape(2, 3) for dtype in dtypes}
    tensors["scalar"] = np.asarray(1.5, np.float32)
    write_pth(tmp_path / "a.pth", tensors)
    assert_equal(read_pth(tmp_path / "a.pth"), tensors)
    torch = pytest.importorskip("torch")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(state) == list(tensors)
    for name, tensor in state.items():
        assert tensor.shape == tensors[name].shape
        assert str(tensor.dtype) == f"torch.{tensors[name].dtype}"
        assert (tensor.double().numpy() == tensors[name].astype(np.float64)).all()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes_is_read(protocol, is_zip, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state |= {"view": torch.arange(6.0).reshape(2, 3).T, "half": torch.arange(4).half()[1:]}
    format = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save(state, tmp_path / "a.pth", **format)
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    assert_equal(read_pth(tmp_path / "a.pth"), tensors)


def test_both_byte_orders(tmp_path):
    """A machine of either order reads files of both."""
    content, values = {"a": stored()}, np.arange(1, 5, dtype=np.float32)
    for order, code in (("little", "<f4"), ("big", ">f4")):
        storages = {"0": values.astype(code).tobytes()}
        path = zip_file(tmp_path / f"{order}.pth", content, storages, order=order)
        assert_equal(read_pth(path), {"a": values})
    swapped = read_pth(legacy_file(tmp_path / "a.pth", content, little_endian=False))
    assert_equal(swapped, {"a": values.byteswap()})


def test_tensors_share_one_allowance_for_repeated_elements(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "ROOM", 2**20)
    repeated = stored(shape=(2**17,), strides=(0,))  # of half a MB
    path = zip_file(tmp_path / "a.pth", {name: repeated for name in "ab"})
    assert read_pth(path)["b"].nbytes == 2**19
    with pytest.raises(UsageError, match="far larger than itself"):
        read_pth(zip_file(tmp_path / "a.pth", {name: repeated for name in "abcd"}))


# What is refused: in one line, without being executed, and in little memory.


def refused(path: Path, words: str) -> None:
    with pytest.raises(UsageError) as error, memory.bounded():
        read_pth(path)
    message = str(error.value)
    assert path.name in message and words in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "harm", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "deque")]
)
def test_other_objects_are_refused_unexecuted(harm, form, tmp_path):
    """Before the tensors and after them; the command would leave a file."""
    mark = tmp_path / "executed"
    command = f"__import__('os').system('touch {mark}')" if "eval" in harm else f"touch {mark}"
    call = _Called(_Global(*harm), command)
    for content in ({"a": call, "b": stored()}, {"b": stored(), "a": call}):
        refused(FORMS[form](tmp_path / "harm.pth", content), f"asks for {'.'.join(harm)!r}")
        assert not mark.exists()
    if harm == ("os", "system"):  # the same call executes its command where everything is admitted
        pickle.loads(_Pickler.dumps(call))
        assert mark.exists()


def long_shapes() -> bytes:
    """A tuple of 300,000 sizes that 1,500 tensors have for their shape and strides."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR"
    items = b"".join(b"X\x04\x00\x00\x00%04x" % n + tensor for n in range(1500))
    return b"\x80\x02(" + b"K\x01" * 300_000 + b"tq\x000}(" + items + b"u."


def many_tensors() -> bytes:
    """As many as a pickle of 1 MB can name, of one element each, and 16 axes."""
    ones = b"(" + b"K\x01" * 16 + b"tq\x01"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00"
    arguments = b"(" + storage + b"cpuK\x04tQK\x00" + ones + b"h\x01tq\x02"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rq\x030"
    items = b"".join(b"X\x04\x00\x00\x00%04xh\x03" % n for n in range(2**16))
    return b"\x80\x02" + tensor + b"}(" + items + b"uK\x00K\x00s."


def nested(opener: bytes, depth: int = 100_000) -> bytes:
    """A dict whose key is nested in tuples so deep that to hash it would end the process."""
    return b"\x80\x02}" + opener + b"\x85" * depth + b"K\x01s."


VIEW, TYPE = b"\x80\x02ctorch._utils\n_rebuild_tensor\n", b"\x80\x02ctorch\nFloatStorage\n"

# name -> a pickle, or the tensor "a" of a state dict; words of the message.
REFUSED = {
    # What would end the process, or take gigabytes, or for ever.
    "deep key": (lambda: nested(b")"), "names for keys"),
    "doubled key": (lambda: b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"K\x01s.", "names for keys"),
    "deep reference": (lambda: b"\x80\x02)" + b"\x85" * 100_000 + b"Q.", "not the storage"),
    "far memo": (lambda: b"\x80\x02)r\x00\x00\x00\x10.", "holds one tuple"),  # 2**28
    "full memo": (lambda: b"\x80\x04N" + b"\x94" * 1_000_000 + b".", "holds one NoneType"),
    "marks": (lambda: b"\x80\x02" + b"(" * 200_000 + b".", "no readable PyTorch file"),
    "dicts": (lambda: b"\x80\x02" + b"}" * 1_000_000 + b"K\x01.", "holds one int"),
    "long pickle": (lambda: b"\x80\x02" + b"]" * 2**24 + b".", "state"),
    "long text": (lambda: b"\x80\x02X\xff\xff\xff\xff.", "no readable PyTorch file"),  # of 4 GB
    "long name": (lambda: b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.", "refused, nothing was executed"),
    "long key": (lambda: b"\x80\x02}X@B\x0f\x00" + b"a" * 10**6 + b"K\x01s.", "no tensor"),
    "long number": (lambda: b"\x80\x02\x8b@B\x0f\x00" + b"a" * 10**6 + b".", "holds one int"),
    "long shapes": (long_shapes, "is damaged"),
    "many tensors": (many_tensors, "a int and no tensor"),
    # What no state dict does.
    "object": (lambda: TYPE + b")\x81.", "KeyError"),
    "call of a type": (lambda: TYPE + b")R.", "no readable PyTorch file"),
    "append to a dict": (lambda: b"\x80\x02}K\x01a.", "no readable PyTorch file"),
    "altered function": (lambda: VIEW + b"}X\x01\x00\x00\x00aK\x01sb.", "alters a function"),
    "empty": (lambda: b"", ""),
    "another pickle": (lambda: pickle.dumps(3), "holds one int"),
    # Tensors that are none.
    "no tensor": (lambda: 3, "'a', a int and no tensor"),
    "no storage": (lambda: _Called(_Global("torch._utils", "_rebuild_tensor"), 3, 0, (), ()), "no"),
    "axes": (lambda: stored(shape=(1,) * 99, strides=(1,) * 99), "no readable PyTorch file"),
    "other strides": (lambda: stored(shape=(2, 2)), "strides"),
    "text for a size": (lambda: stored(shape=("x",)), "no shape"),
    "too long": (lambda: stored(shape=(5,)), "size of buffer"),
    "too far": (lambda: stored(shape=(2, 2), strides=(3, 1)), "size of buffer"),
    "backwards": (lambda: stored(strides=(-1,), offset=3), "no shape"),
    "before its storage": (lambda: stored(shape=(2,), offset=-1), "no shape"),
    "beyond 2**62": (lambda: stored(shape=(2**70,)), "no readable PyTorch file"),
    "beyond 2**62 bytes": (lambda: stored(shape=(2**62,), strides=(0,)), "too big"),
    "negative storage": (lambda: stored(count=-4), "storage '0' is cut short"),
    "storage of a terabyte": (lambda: stored(count=2**38), "storage '0' is cut short"),
    "one element a trillion times": (
        lambda: stored(shape=(2**40,), strides=(0,)),
        "far larger than itself",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, form, tmp_path):
    make, words = REFUSED[name]
    content = make()
    content = content if isinstance(content, bytes) else {"a": content}
    refused(FORMS[form](tmp_path / "refused.pth", content), words)


@pytest.mark.parametrize(
    ("content", "fields", "words"),
    [
        ({"a": stored(count=3)}, {}, "storage '0' is missing or of another size"),
        ({"a": stored(key="1")}, {}, "storage '1' is missing or of another size"),
        ({"a": stored(), "b": stored("IntStorage")}, {}, "storage '0' has two descriptions"),
        ({"a": stored()}, {"order": "middle"}, "byte order is 'middle'"),
        ({"a": stored()}, {"compression": zipfile.ZIP_DEFLATED}, "is a compressed zip file"),
    ],
)
def test_damaged_zip_files_are_refused(content, fields, words, tmp_path):
    refused(zip_file(tmp_path / "a.pth", content, **fields), words)


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"text" * 30, None])
def test_other_files_are_refused(raw, tmp_path):
    path = tmp_path / "other.pth"
    path.mkdir() if raw is None else path.write_bytes(raw)
    refused(path, "")


@pytest.mark.parametrize("name", ["uncond.pth", "uncond_vp.legacy.pth"])
def test_files_cut_short_are_refused(name, tmp_path):
    raw = (GOLDEN / "tarflow" / name).read_bytes()
    for share in (0.01, 0.3, 0.999):
        (tmp_path / "short.pth").write_bytes(raw[: int(share * len(raw))])
        refused(tmp_path / "short.pth", "")
