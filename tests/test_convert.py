"""Published checkpoints in all their formats; files that ask for more than tensors; round trips."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import GOLDEN, JETS, case, jet_arguments, settings_of, tarflow_arguments

import jetflow
from jetflow import cli, convert
from jetflow.convert import big_vision, tables, torch_file, torch_writer
from jetflow.convert.mapping import from_published
from jetflow.flows import orders
from jetflow.types import UsageError
from jetflow.workdir import load_model

PTH = GOLDEN / "tarflow"
LEGACY = PTH / "uncond_vp.legacy.pth"
WORKDIR = GOLDEN / "jet" / "spatial_only_workdir"
BIG_VISION = ["--image_shape=8,8,1", "--patch_size=2", "--num_heads=4", "--kinds=spatial"]


def assert_equal(actual, expected) -> None:
    """The same arrays of the same names, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# --- what is read off the tensors ----------------------------------------------------------------


def test_sizes_are_read_off_the_tensors():
    cond, vp, jet = case("cond").flow, case("uncond_vp").flow, case("mixed").flow
    assert (cond.num_classes, len(cond.blocks), cond.learned_prior) == (5, 3, False)
    assert [block.num_layers for block in cond.blocks] == [2, 2, 2]
    assert (vp.num_classes, len(vp.blocks), vp.learned_prior) == (0, 2, True)
    (couplings,) = jet.blocks
    assert (couplings.num_couplings, couplings.block_depth, couplings.width) == (10, 1, 64)


def test_functions_are_public():
    assert jetflow.convert.tarflow is convert.tarflow
    assert jetflow.convert.jet is convert.jet


# --- TarFlow's files -----------------------------------------------------------------------------


def test_legacy_format_is_the_same_model():
    _, variables = convert.tarflow(LEGACY, **tarflow_arguments(settings_of("uncond_vp")))
    assert_equal(variables, case("uncond_vp").variables)


def state_dict(path: Path, content, storages: dict[str, bytes], compression=0) -> Path:
    """A zip-format .pth with a pickle of any content."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", _Pickler.dumps(content))
        archive.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


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


def stored(kind, shape, strides, *, key="0", offset=0, count=None) -> _Called:
    count = count if count is not None else int(np.prod(shape))
    storage = ("PERSISTENT", "storage", _Global("torch", kind), key, "cpu", count)
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    return _Called(rebuild, storage, offset, shape, strides, False, OrderedDict())


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
    read = torch_file.read(state_dict(tmp_path / "a.pth", content, {"0": values.tobytes()}))
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


# --- what a file may not ask for -----------------------------------------------------------------

FLOATS = {"0": np.zeros(4, np.float32).tobytes()}


def legacy_file(path: Path, content) -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    pickles = [torch_file.LEGACY_MAGIC, 1001, system, content, ["0"]]
    raw = b"".join(map(_Pickler.dumps, pickles)) + (4).to_bytes(8, "little") + FLOATS["0"]
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    "harm",
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
     ("subprocess", "Popen"), ("torch", "load"), ("torch.serialization", "os.system"),
     ("collections", "namedtuple"), ("torch._utils", "__builtins__")],
)  # fmt: skip
def test_other_objects_are_refused_unexecuted(harm, form, tmp_path):
    """Before the tensors and after them; the command would leave a file."""
    mark = tmp_path / "executed"
    command = f"__import__('os').system('touch {mark}')" if "eval" in harm else f"touch {mark}"
    tensor = stored("FloatStorage", (4,), (1,))
    for content in (
        {"a": _Called(_Global(*harm), command), "b": tensor},
        {"b": tensor, "a": _Called(_Global(*harm), command)},
        {"b": tensor, "a": _Global(*harm)},
    ):
        path = tmp_path / "harm.pth"
        state_dict(path, content, FLOATS) if form == "zip" else legacy_file(path, content)
        with pytest.raises(UsageError, match=rf"harm.pth asks for {harm[0]}\.{harm[1]}; refused"):
            torch_file.read(path)
        assert not mark.exists()


def test_file_is_a_real_danger(tmp_path):
    """The same file executes its command where everything is admitted."""
    mark = tmp_path / "executed"
    content = {"a": _Called(_Global(os.system.__module__, "system"), f"touch {mark}")}
    pickle.loads(_Pickler.dumps(content))
    assert mark.exists()


@pytest.mark.parametrize("state", [{"_function": 1}, (None, {"_function": 1})])
@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "collections OrderedDict"])
def test_admitted_functions_cannot_be_altered(name, state, tmp_path):
    module, function = name.split()
    raw = _Pickler.dumps({"a": _Global(module, function)})
    state = pickle.dumps(state, protocol=2)[2:-1]
    place = raw.index(f"{function}\n".encode()) + len(function) + 1
    path = tmp_path / "alters.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw[:place] + state + pickle.BUILD + raw[place:])
    with pytest.raises(UsageError, match=r"alters\.pth"):
        torch_file.read(path)
    assert_equal(torch_file.read(PTH / "uncond.pth"), torch_file.read(PTH / "uncond.pth"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (stored("FloatStorage", (5,), (1,), count=4), "a reaches out of its storage"),
        (stored("FloatStorage", (2,), (1,), offset=3, count=4), "a reaches out of its storage"),
        (stored("FloatStorage", (2, 2), (3, 1), count=4), "a reaches out of its storage"),
        (stored("FloatStorage", (4,), (-1,), offset=3), "a reaches out of its storage"),
        (stored("FloatStorage", (2,), (1,), offset=-1, count=4), "a reaches out of its storage"),
        (stored("FloatStorage", (8,), (1,)), "the storage of a is cut short"),
        (stored("FloatStorage", (-1,), (1,), count=4), "a reaches out of its storage"),
        (stored("FloatStorage", (2,), (1, 1), count=4), r"the shape of a is \(2,\)"),
        (stored("FloatStorage", (2**40,), (0,), count=4), "a repeats few elements"),
        (stored("FloatStorage", (4,), (1,), key="1"), "no readable PyTorch file"),
        (stored("StrangeStorage", (4,), (1,)), "asks for torch.StrangeStorage"),
        (3, r"holds more than tensors: 'a' \(int\)"),
        ({"b": 3}, r"holds more than tensors: 'a' \(dict\)"),
    ],
)
def test_what_does_not_hold_together_is_refused(tensor, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        torch_file.read(state_dict(tmp_path / "a.pth", {"a": tensor}, FLOATS))


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


# --- Jet's checkpoints ---------------------------------------------------------------------------


def test_every_form_is_the_same_model(tmp_path):
    arguments = jet_arguments(settings_of("spatial_only"))
    bare = tmp_path / "bare.npz"
    np.savez(bare, **big_vision.read(GOLDEN / "jet" / "spatial_only.npz"))
    sources = [WORKDIR, WORKDIR / "checkpoint.bv-000000012", WORKDIR / "checkpoint.bv", bare]
    for source in sources:
        flow, variables = convert.jet(source, **arguments)
        assert flow == case("spatial_only").flow
        assert_equal(variables, case("spatial_only").variables)


@pytest.mark.parametrize("name", JETS)
def test_splits_are_those_of_a_new_flow(name):
    """Spatial ones; those of channels are random."""
    found = case(name)
    (block,) = found.flow.blocks
    new = orders.splits(block.num_couplings, block.kinds, block.grid, block.features)
    read = found.variables["constants"]["blocks_0"]
    assert_equal(read["token_order"], new.token_order)
    assert_equal(read["spatial"], new.spatial)


def test_bad_checkpoints_are_refused(tmp_path):
    pointer = tmp_path / "workdir" / "checkpoint.bv-LAST"
    pointer.parent.mkdir()
    with pytest.raises(UsageError, match="workdir is no checkpoint of big_vision; expected an"):
        big_vision.read(pointer.parent)
    pointer.write_text("000000003")
    with pytest.raises(
        UsageError, match=r"points to .*checkpoint\.bv-000000003, which is not there"
    ):
        big_vision.read(pointer.parent)
    with pytest.raises(UsageError, match="nowhere is no checkpoint"):
        big_vision.read(tmp_path / "nowhere")
    for content in (b"", b"text", pickle.dumps({"a": 3})):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"a\.npz cannot be read"):
            big_vision.read(tmp_path / "a.npz")
    damaged = tmp_path / "checkpoint.bv-000000012"
    shutil.copytree(WORKDIR / damaged.name, damaged)
    (damaged / "params~couplings~dnn~init_proj~kernel" / "0.0.0").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"checkpoint\.bv-000000012 cannot be read"):
        big_vision.read(damaged)


# --- names that do not match ---------------------------------------------------------------------


def written(tmp_path: Path, change) -> Path:
    """The conditional TarFlow with its tensors changed."""
    tensors = torch_file.read(PTH / "cond.pth")
    change(tensors)
    torch_writer.write(tmp_path / "changed.pth", tensors)
    return tmp_path / "changed.pth"


QKV = "blocks.1.attn_blocks.0.attention.qkv"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(extra=t["var"], more=t["var"]), ["unknown: extra, more"]),
        (lambda t: [t.pop(f"{QKV}.{kind}") for kind in ("bias", "weight")],
         [f"missing: {QKV}.bias, {QKV}.weight"]),
        (lambda t: t.update(QKV=t.pop(f"{QKV}.bias")), [f"missing: {QKV}.bias; unknown: QKV"]),
        (lambda t: t.update({f"{QKV}.scale": t["var"]}), [f"unknown: {QKV}.scale"]),
        (lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].T}), [f"{QKV}.weight", "fit"]),
        (lambda t: t.pop("blocks.1.class_embed"), ["missing: blocks.1.class_embed"]),
        (lambda t: t.pop("blocks.0.class_embed"),
         ["unknown: blocks.1.class_embed, blocks.2.class_embed"]),
        (lambda t: t.update({"blocks.1.attn_mask": t["blocks.1.attn_mask"].T}),
         ["not as in the published model: blocks.1.attn_mask"]),
        (lambda t: t.update(var=2 * t["var"]), ["not as in the published model: var"]),
        (lambda t: t.update({"blocks.2.proj_out.bias": t["blocks.2.proj_out.bias"][1:]}),
         ["of another shape: params/blocks_2/proj_out/bias (is (23,), expected (24,))"]),
        (lambda t: t.pop("blocks.0.proj_in.weight"), ["has no tensor blocks.0.proj_in.weight"]),
    ],
)  # fmt: skip
def test_names_that_do_not_match_are_listed(change, said, tmp_path):
    with pytest.raises(UsageError) as error:
        convert.tarflow(written(tmp_path, change), **tarflow_arguments(settings_of("cond")))
    for part in said:
        assert part in str(error.value)


def test_names_of_jet_that_do_not_match_are_listed(tmp_path):
    tensors = big_vision.read(GOLDEN / "jet" / "mixed.npz")
    tensors["couplings/dnn/MultiHeadDotProductAttention_0/key/bias"] = np.zeros(3)
    del tensors["couplings/dnn/vit/encoderblock_0/LayerNorm_1/bias"]
    np.savez(tmp_path / "a.npz", **{f"params/{name}": array for name, array in tensors.items()})
    with pytest.raises(UsageError) as error:
        convert.jet(tmp_path / "a.npz", **jet_arguments(settings_of("mixed")))
    assert "missing: couplings/dnn/vit/encoderblock_0/LayerNorm_1/bias" in str(error.value)
    assert "unknown: couplings/dnn/MultiHeadDotProductAttention_0/key/bias" in str(error.value)


def test_variables_that_nothing_fills_are_listed():
    tensors, variables = torch_file.read(PTH / "cond.pth"), case("cond").variables
    more = {**variables, "params": {**variables["params"], "scale": np.zeros(3), "blocks_9": {}}}
    more["extra"] = {"bias": np.zeros(3)}
    with pytest.raises(UsageError, match="nothing fills: params/scale, extra/bias"):
        from_published(tables.TARFLOW, tensors, more)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 4}, "num_heads is 4, but .* has 2"),
        ({"patch_size": 2}, "make 64 patches of 12 features, but the checkpoint has 16 of 48"),
        ({"patch_size": 3}, "image height 16 is not divisible by patch 3"),
        (
            {"kinds": ("spatial", "channels")},
            r"kinds is \('spatial', 'channels'\), but .* channels,",
        ),
        ({"kinds": ("diagonal",)}, "diagonal"),
    ],
)
def test_sizes_that_do_not_match_are_refused(fields, message):
    arguments = jet_arguments(settings_of("mixed")) | fields
    with pytest.raises(UsageError, match=message):
        convert.jet(GOLDEN / "jet" / "mixed.npz", **arguments)


def test_split_that_is_no_permutation_is_refused(tmp_path):
    tensors = big_vision.read(GOLDEN / "jet" / "mixed.npz")
    tensors["channel_coupling_masks-FREEZE_ME"][0, 0] = 1
    np.savez(tmp_path / "a.npz", **tensors)
    with pytest.raises(UsageError, match=r"channel_coupling_masks.* no permutation"):
        convert.jet(tmp_path / "a.npz", **jet_arguments(settings_of("mixed")))


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cond", "uncond", "uncond_vp"])
def test_round_trip(name, tmp_path):
    """Workdir, .pth, workdir, .pth: every tensor of the first file, and twice the same bytes."""
    settings = tarflow_arguments(settings_of(name))
    flags = [f"--{field}={value}" for field, value in settings.items()]
    source, copies = PTH / f"{name}.pth", []
    for turn in ("first", "second"):
        workdir, copy = tmp_path / turn, tmp_path / f"{turn}.pth"
        assert cli.main(["convert", "tarflow", str(source), "--out", str(workdir), *flags]) == 0
        back = ["convert", "--reverse", "tarflow", str(workdir), "--out", str(copy)]
        assert cli.main(back) == 0
        copies.append(copy)
        source = copy
    first, second = (copy.read_bytes() for copy in copies)
    assert first == second
    published, ours = torch_file.read(PTH / f"{name}.pth"), torch_file.read(copies[0])
    assert_equal(ours, {key: published[key] for key in ours})
    assert set(ours) == set(published)


@pytest.fixture(scope="module")
def jet_workdir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "jet"
    arguments = ["convert", "jet", str(WORKDIR), *BIG_VISION, "--data=digits", f"--out={out}"]
    assert cli.main(arguments) == 0
    return out


def test_workdir_is_the_model(jet_workdir):
    model = load_model(jet_workdir)
    assert model.flow == case("spatial_only").flow
    assert_equal(model.variables, case("spatial_only").variables)
    assert model.step == 0


def test_workdir_can_be_sampled_and_evaluated(jet_workdir, tmp_path, compilation_cache):
    out = tmp_path / "grid.png"
    assert cli.main(["sample", "--workdir", str(jet_workdir), "--num=4", "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    assert cli.main(["evaluate", "--workdir", str(jet_workdir), "--draws=1"]) == 0
    result = json.loads(next((jet_workdir / "evals").glob("bpd-*.json")).read_text())
    assert 0 < result["value"] < 20


FINETUNE = {"flow.patch_size": 2, "flow.width": 32, "flow.num_heads": 4, "flow.num_couplings": 6}
FINETUNE |= {"flow.block_depth": 2, "data.name": "digits", "train.steps": 1, "optim.lr": 1e-9}
FINETUNE |= {"eval.draws": 1, "eval.samples": 4, "train.batch_size": 8, "train.ema_decay": 0.5}
KINDS = "('spatial',)"


def finetune(source: Path, workdir: Path, **fields) -> int:
    config = Path(__file__).parent.parent / "configs" / "photos_jet.py"
    settings = FINETUNE | {"flow.kinds": KINDS, "train.init_from": source}
    settings |= {name.replace("__", "."): value for name, value in fields.items()}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return cli.main(["train", "--config", str(config), "--workdir", str(workdir), *flags])


def test_training_starts_from_the_workdir(jet_workdir, tmp_path, data_dir, compilation_cache):
    """With a learning rate of almost nothing, it ends where it starts."""
    assert finetune(jet_workdir, tmp_path / "run") == 0
    model, start = load_model(tmp_path / "run"), case("spatial_only").variables
    assert model.step == 1
    for one, other in zip(jax.tree.leaves(model.variables), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"flow__num_heads": 2}, "it holds another flow; take config.flow from its config.json"),
        ({"flow__width": 64}, "it holds another flow"),
        ({"train__init_from": "none"}, "config.train.init_from is none: no run in none"),
    ],
)
def test_training_from_another_flow_is_refused(fields, said, jet_workdir, tmp_path, capsys):
    assert finetune(jet_workdir, tmp_path / "run", **fields) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL is missing; expected jetflow convert tarflow"),
        (["tarflow"], "SRC is missing"),
        (["tarflow", "a", "b"], "unexpected argument 'b'"),
        (["glow", "a", "--out=b"], "'glow' is no model to convert; expected tarflow or jet"),
        (["jet", "a", *BIG_VISION], "--out is missing; expected --out runs/NAME"),
        (["jet", "a", "--out=b"], "--image_shape is missing; expected --image_shape 64,64,3"),
        (["jet", "a", "--out=b", *BIG_VISION[1:], "--image_shape=8,8"],
         "--image_shape is 8,8; expected height,width,channels"),
        (["jet", "a", "--out=b", *BIG_VISION], "a is no checkpoint of big_vision"),
        (["jet", "a", "--out=b", *BIG_VISION, "--channels=3"], "--channels is for tarflow"),
        (["tarflow", "a", "--out=b", "--image_size=x"], "--image_size is 'x'; expected"),
        (["tarflow", "a", "--out=b", "--image_size=8", "--channels=3"], "--patch_size is missing"),
        (["tarflow", "a", "--out=b", "--image_size=8", "--channels=3", "--patch_size=2"],
         "a cannot be read"),
        (["--reverse", "tarflow", "a", "--out=b.pth"], "no run in a"),
        (["--reverse", "jet", "a", "--out=b.pth"], "--reverse writes a tarflow, not a jet"),
    ],
)  # fmt: skip
def test_bad_command_lines(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(jet_workdir, tmp_path, capsys):
    again = ["convert", "jet", str(WORKDIR), *BIG_VISION, f"--out={jet_workdir}"]
    assert cli.main(again) == 2
    assert "holds a run already; give another --out" in capsys.readouterr().err
    out = tmp_path / "a.pth"
    out.touch()
    assert cli.main(["convert", "--reverse", "tarflow", "a", f"--out={out}"]) == 2
    assert "a.pth exists; give another --out" in capsys.readouterr().err


def test_jet_cannot_be_written_as_tarflow(jet_workdir, tmp_path, capsys):
    arguments = ["--reverse", "tarflow", str(jet_workdir), "--out", str(tmp_path / "a.pth")]
    assert cli.main(["convert", *arguments]) == 2
    assert "only a TarFlow can be written" in capsys.readouterr().err
