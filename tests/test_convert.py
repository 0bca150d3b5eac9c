"""Published checkpoints in all their formats, as flows, as workdirs, and written back."""

import io
import json
import pickle
import shlex
import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import memory
import numpy as np
import pytest
from published import (
    GOLDEN,
    JETS,
    assert_equal,
    case,
    jet_arguments,
    settings_of,
    tarflow_arguments,
)

from jetflow import cli, load_model
from jetflow.flows import coupling
from jetflow.pth import read_pth, write_pth
from jetflow.tools import convert
from jetflow.tools.convert import big_vision
from jetflow.types import UsageError

PTH = GOLDEN / "tarflow"
WORKDIR = GOLDEN / "jet" / "spatial_only_workdir"
MIXED = GOLDEN / "jet" / "mixed.npz"
CONFIGS = Path(__file__).parent.parent / "configs"


# --- what is read off the tensors ----------------------------------------------------------------


def test_legacy_format_is_the_same_model():
    path = PTH / "uncond_vp.legacy.pth"
    _, variables = convert.tarflow(path, **tarflow_arguments(settings_of("uncond_vp")))
    assert_equal(variables, case("uncond_vp").variables)


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
    new = coupling.splits(block.num_couplings, block.kinds, block.grid, block.features)
    read = found.variables["constants"]["blocks_0"]
    assert_equal(read["token_order"], new.token_order)
    assert_equal(read["spatial"], new.spatial)


def pointer(folder: Path) -> Path:
    (folder / "checkpoint.bv-LAST").write_text("000000003")
    return folder


def file_of(folder: Path, content: bytes) -> Path:
    (folder / "a.npz").write_bytes(content)
    return folder / "a.npz"


def npz_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def folder_with(folder: Path, file: str, content: bytes | None) -> Path:
    """The folder of arrays with one file of another content, or without it."""
    copy = folder / "checkpoint.bv-000000012"
    shutil.copytree(WORKDIR / copy.name, copy)
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    return copy


POSITIONS = "params~couplings~dnn~posemb"


def large(**sizes: list[int]) -> bytes:
    """The description of an array of 2**38 bytes, or of such chunks."""
    fields = {"zarr_format": 2, "dtype": "<f4", "order": "C", "compressor": None, "filters": None}
    return json.dumps(fields | {"fill_value": 0, "shape": [1], "chunks": [1]} | sizes).encode()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "is no checkpoint of big_vision"),
        (lambda folder: folder / "nowhere", "nowhere is no checkpoint"),
        (pointer, "checkpoint.bv-000000003, which is not there"),
        (lambda folder: file_of(folder, b""), "a.npz cannot be read"),
        (lambda folder: file_of(folder, pickle.dumps({"a": 3})), "a.npz cannot be read"),
        (
            lambda folder: file_of(folder, npz_of("params/a\n\x1b[2J.npy", b"text")),
            "params/a [2J: ",
        ),
        (lambda folder: folder_with(folder, f"{POSITIONS}/0.0.0.0", b"text"), "cannot be read"),
        (lambda folder: folder_with(folder, f"{POSITIONS}/0.0.0.0", None), "cannot be read"),
        (lambda folder: folder_with(folder, f"{POSITIONS}/.zarray", b"{"), "cannot be read"),
        (
            lambda folder: folder_with(folder, f"{POSITIONS}/.zarray", large(shape=[2**36])),
            "far larger than their files",
        ),
        (
            lambda folder: folder_with(folder, f"{POSITIONS}/.zarray", large(chunks=[2**36])),
            "far larger than their files",
        ),
    ],
)
def test_bad_checkpoints_are_refused(make, words, tmp_path):
    """A missing chunk is no zeros; and no more memory is taken than the files have."""
    with pytest.raises(UsageError) as error, memory.bounded():
        big_vision.read(make(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


# --- tensors that do not match -------------------------------------------------------------------


def put(name: str, change, source: str = ""):
    """A change of tensors: `name` is what `change` makes of the tensor `source`."""
    return lambda tensors: tensors.update({name: change(tensors[source or name])})


def pop(*names: str):
    return lambda tensors: [tensors.pop(name) for name in names]


def same(array):
    return array


def with_entry(index, value):
    """The same array with another value at an index."""

    def change(array):
        array = np.array(array)
        array[index] = value
        return array

    return change


QKV = "blocks.1.attn_blocks.0.attention.qkv"
OF_TARFLOW = [
    (put("extra", same, "var"), "unknown: 'extra'"),
    (put("\x1b[2J", same, "var"), r"unknown: '\x1b[2J'"),
    (put("blocks.0.attn_blocks.3000.x", same, "var"), "unknown: 'blocks.0.attn_blocks.3000.x'"),
    (pop(f"{QKV}.bias", f"{QKV}.weight"), f"missing: {QKV}.bias, {QKV}.weight"),
    (pop("blocks.0.class_embed"), "'blocks.1.class_embed', 'blocks.2.class_embed'"),
    (pop("blocks.0.proj_in.weight"), "has no tensor blocks.0.proj_in.weight"),
    (put(f"{QKV}.weight", np.transpose), "not fit"),
    (put("blocks.1.attn_mask", np.transpose), "not as in the published model: blocks.1.attn_mask"),
    (put("var", lambda var: 2 * var), "not as in the published model: var"),
    (put("blocks.2.proj_out.bias", lambda bias: bias[1:]), "(is (23,), expected (24,))"),
    (put("blocks.0.class_embed", lambda var: var[0], "var"), "(12,); expected 3 axes"),
    (
        put("blocks.0.proj_in.weight", lambda weight: weight[:0]),
        "(0, 12); expected 2 axes, none of them empty",
    ),
]
CHANNEL, SPATIAL = (f"{kind}_coupling_masks-FREEZE_ME" for kind in ("channel", "spatial"))
LAYER, KERNEL = "couplings/dnn/vit/encoderblock_0/", "couplings/dnn/init_proj/kernel"
ATTENTION = LAYER + "MultiHeadDotProductAttention_0/"
OF_JET = [
    (put("x", same, KERNEL), "unknown: 'x'"),
    (pop(LAYER + "LayerNorm_1/bias"), f"missing: {LAYER}LayerNorm_1/bias"),
    (put(CHANNEL, with_entry((0, 0), 1)), "no permutation"),
    (put(CHANNEL, lambda masks: masks[0]), "(48, 48); expected (layers, N, N)"),
    (put(SPATIAL, with_entry(-1, 0)), "[9] have split matrices of both kinds or of none"),
    (put(SPATIAL, with_entry(0, np.eye(16))), "[0] have split matrices of both kinds or of none"),
    (put(ATTENTION + "key/kernel", lambda a: a.swapaxes(2, 3)), "(32, 2), not (2, 32)"),
    (put(ATTENTION + "out/kernel", lambda a: a.swapaxes(1, 2)), "(32, 2), not (2, 32)"),
    (put(KERNEL, lambda kernel: kernel.astype("U8")), f"not of real numbers: {KERNEL} (<U8)"),
    (put(KERNEL, lambda kernel: kernel.astype(np.complex64)), "(complex64)"),
]


@pytest.mark.parametrize(
    ("is_jet", "change", "words"),
    [(False, *row) for row in OF_TARFLOW] + [(True, *row) for row in OF_JET],
)
def test_tensors_that_do_not_match_are_named(is_jet, change, words, tmp_path):
    path = tmp_path / "changed"
    tensors = big_vision.read(MIXED) if is_jet else read_pth(PTH / "cond.pth")
    change(tensors)
    if is_jet:
        with open(path, "wb") as file:
            np.savez(file, **{f"params/{name}": array for name, array in tensors.items()})
    else:
        write_pth(path, tensors)
    with pytest.raises(UsageError) as error:
        if is_jet:
            convert.jet(path, **jet_arguments(settings_of("mixed")))
        else:
            convert.tarflow(path, **tarflow_arguments(settings_of("cond")))
    assert words in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 4}, "num_heads is 4, but"),
        ({"patch_size": 2}, "make 64 patches of 12 features, but the checkpoint has 16 of 48"),
        ({"patch_size": 3}, "not divisible by patch 3"),
        ({"kinds": ("spatial", "channels")}, "kinds is ('spatial', 'channels'), but"),
        ({"kinds": ("diagonal",)}, "diagonal"),
        ({"image_shape": (16, 16)}, "image_shape is (16, 16); expected (height, width, channels"),
        ({"image_shape": (-16, -16, 3)}, "image_shape is -16"),
        ({"scale_factor": 0.0}, "scale_factor is 0.0"),
    ],
)
def test_sizes_that_do_not_match_are_refused(fields, words):
    with pytest.raises(UsageError) as error:
        convert.jet(MIXED, **jet_arguments(settings_of("mixed")) | fields)
    assert words in str(error.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_real_numbers_are_read(dtype, tmp_path):
    tensors, path = big_vision.read(MIXED), tmp_path / "a.npz"
    np.savez(path, **{name: array.astype(dtype) for name, array in tensors.items()})
    sizes = jet_arguments(settings_of("mixed"))
    flow, variables = convert.jet(path, **sizes, scale_factor=1.5)
    assert flow.blocks[0].layers.scale_factor == 1.5
    kernel = variables["params"]["blocks_0"]["layers"]["net"]["proj_in"]["kernel"]
    assert_equal(kernel, jnp.asarray(tensors[KERNEL].astype(dtype).astype(np.float32)))


# --- the command ---------------------------------------------------------------------------------

BIG_VISION = ["--image_shape=8,8,1", "--patch_size=2", "--num_heads=4", "--kinds=spatial"]
SIZES = ["--image_size=8", "--channels=3", "--patch_size=2"]


def tarflow_flags(name: str, noise_std=0.05) -> list[str]:
    sizes = tarflow_arguments(settings_of(name)) | {"noise_std": noise_std}
    return [f"--{field}={value}" for field, value in sizes.items()]


@pytest.mark.parametrize("name", ["cond", "uncond_vp"])
def test_round_trip(name, tmp_path):
    """From a .pth to a workdir and back: every tensor of the first file."""
    source, copy = str(PTH / f"{name}.pth"), tmp_path / "copy.pth"
    forth = ["tarflow", source, f"--out={tmp_path}/run", *tarflow_flags(name)]
    assert cli.main(["convert", *forth]) == 0
    back = ["--reverse", "tarflow", f"{tmp_path}/run", f"--out={copy}"]
    assert cli.main(["convert", *back]) == 0
    published, ours = read_pth(source), read_pth(copy)
    assert_equal(ours, {key: published[key] for key in ours})
    assert set(ours) == set(published)


@pytest.fixture(scope="module")
def jet_workdir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "a jet"
    arguments = ["convert", "jet", str(WORKDIR), *BIG_VISION, "--data=digits", f"--out={out}"]
    assert cli.main(arguments) == 0
    return out


def test_workdir_serves_every_command(jet_workdir, tmp_path, capsys, data_dir, compilation_cache):
    """A training with a learning rate of almost nothing ends where the checkpoint is."""
    model = load_model(jet_workdir)
    assert model.flow == case("spatial_only").flow and model.step == 0
    assert_equal(model.variables, case("spatial_only").variables)
    out = tmp_path / "grid.png"
    assert cli.main(["sample", "--workdir", str(jet_workdir), "--num=4", "--out", str(out)]) == 0
    assert cli.main(["evaluate", "--workdir", str(jet_workdir), "--draws=1"]) == 0
    result = json.loads(next((jet_workdir / "evals").glob("bpd-*.json")).read_text())
    assert 0 < result["value"] < 20

    again = ["convert", "jet", str(WORKDIR), *BIG_VISION, f"--out={tmp_path}/a b"]
    capsys.readouterr()
    assert cli.main(again) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("train it on:")]
    words = shlex.split(line.partition("jetflow ")[2])
    words[words.index("--config") + 1] = str(CONFIGS / "photos_jet.py")
    words[words.index("…")] = str(tmp_path / "run")
    tiny = {"train.steps": 1, "optim.lr": 1e-9, "eval.draws": 1, "eval.samples": 4,
            "train.batch_size": 8, "data.name": "digits"}  # fmt: skip
    assert cli.main([*words, *(f"--config.{name}={value}" for name, value in tiny.items())]) == 0
    kernel = load_model(tmp_path / "run").variables["params"]["blocks_0"]["layers"]["net"][
        "proj_in"
    ]
    start = case("spatial_only").variables["params"]["blocks_0"]["layers"]["net"]["proj_in"]
    np.testing.assert_allclose(kernel["kernel"], start["kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "kind", "scale"),
    [
        (["--noise_std=0.05"], "gaussian", 127.5),
        (["--noise_std=0"], "uniform", 128.0),
        (["--noise_std=0", "--pixel_scale=127.5"], "uniform", 127.5),
    ],
)
def test_pixel_scale_follows_from_the_noise(flags, kind, scale, tmp_path):
    sizes, source = tarflow_flags("uncond")[:3], str(PTH / "uncond.pth")
    assert cli.main(["convert", "tarflow", source, f"--out={tmp_path}/a", *sizes, *flags]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["noise"]["kind"], config["flow"]["pixel_scale"]) == (kind, scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glow", "a", "--out=b"], "'convert glow' is no command; expected jetflow convert"),
        (["jet", "a", *BIG_VISION], "--out is missing; expected --out runs/NAME"),
        (["jet", "a", "--out=b", *BIG_VISION], "a is no checkpoint of big_vision"),
        (["tarflow", "a", "--out=b", *SIZES], "--noise_std is missing; expected --noise_std 0.05"),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=0", "--pixel_scale=0"],
         "pixel_scale is 0.0; expected 1 or more"),
        (["jet", str(WORKDIR), "--out=b", *BIG_VISION, "--data=digit"], "data is 'digit'; known"),
        (["jet", str(WORKDIR), "--out=b", *BIG_VISION, "--data=photos/8"],
         "data photos/8 has images of (8, 8, 3), but the model is for (8, 8, 1); give a"),
        (["jet", str(WORKDIR), "--out=/proc/a", *BIG_VISION], "/proc/a"),
        (["--reverse", "tarflow", "a", "--out=b.pth"], "no run in a"),
        (["--reverse", "tarflow", "a", "--out=b.pth", "--noise_std=0"],
         "--noise_std is no flag of jetflow convert --reverse tarflow"),
    ],
)  # fmt: skip
def test_bad_command_lines(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_written_as_another_model(jet_workdir, tmp_path, capsys):
    source, sizes = str(PTH / "cond.pth"), tarflow_flags("cond")
    narrow = ["tarflow", source, f"--out={tmp_path}/narrow", *sizes, "--head_dim=16"]
    assert cli.main(["convert", *narrow]) == 0
    for arguments, words in (
        (["jet", str(WORKDIR), *BIG_VISION, f"--out={jet_workdir}"], "holds a run already"),
        (["--reverse", "tarflow", str(jet_workdir), f"--out={tmp_path}/a"], "only a TarFlow"),
        (["--reverse", "tarflow", f"{tmp_path}/narrow", f"--out={tmp_path}/a"], "heads of 64"),
        (["--reverse", "tarflow", f"{tmp_path}/narrow", f"--out={source}"], "exists"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]
