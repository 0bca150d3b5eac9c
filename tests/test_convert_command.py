"""`jetflow convert`: workdirs of published checkpoints, used by every command, and the way back."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from published import GOLDEN, assert_equal, case, settings_of, tarflow_arguments

from jetflow import cli
from jetflow.cli.commands import convert
from jetflow.data.sources import SOURCES
from jetflow.model import load_model
from jetflow.tools.convert import torch_file
from jetflow.tools.convert.models import Published
from jetflow.types import UsageError

PTH = GOLDEN / "tarflow"
WORKDIR = GOLDEN / "jet" / "spatial_only_workdir"
BIG_VISION = ["--image_shape=8,8,1", "--patch_size=2", "--num_heads=4", "--kinds=spatial"]
CONFIGS = Path(__file__).parent.parent / "configs"


def tarflow_flags(name: str, noise_std=0.05) -> list[str]:
    sizes = tarflow_arguments(settings_of(name)) | {"noise_std": noise_std}
    return [f"--{field}={value}" for field, value in sizes.items()]


@pytest.mark.parametrize("name", ["cond", "uncond", "uncond_vp"])
def test_round_trip(name, tmp_path):
    """Workdir, .pth, workdir, .pth: every tensor of the first file, and twice the same bytes."""
    flags = tarflow_flags(name)
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


@pytest.fixture(scope="module", params=["uncond_vp", "cond"])
def noisy(request, tmp_path_factory) -> tuple[str, Path, str]:
    """The name and the workdir of a TarFlow with gaussian noise, and what the command printed."""
    out = tmp_path_factory.mktemp("converted") / "tar"
    data = ["--data=photos/8"] if request.param == "uncond_vp" else []
    arguments = ["convert", "tarflow", str(PTH / f"{request.param}.pth"), f"--out={out}", *data]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(texts)))
        assert cli.main([*arguments, *tarflow_flags(request.param)]) == 0
    return request.param, out, "\n".join(lines)


def test_config_says_the_noise(noisy):
    name, workdir, _ = noisy
    config = json.loads((workdir / "config.json").read_text())
    assert config["noise"] == {"kind": "gaussian", "std": 0.05, "label_drop": 0.0, "flip": False}
    assert config["flow"]["pixel_scale"] == 127.5
    assert load_model(workdir).flow == case(name).flow


@pytest.mark.parametrize(
    ("given", "kind", "scale"),
    [
        (["--noise_std=0"], "uniform", 128.0),
        (["--noise_std=0", "--pixel_scale=127.5"], "uniform", 127.5),
        (["--noise_std=0.1", "--pixel_scale=128"], "gaussian", 128.0),
    ],
)
def test_pixel_scale_follows_from_the_noise(given, kind, scale, tmp_path):
    sizes = tarflow_flags("uncond")[:3]
    source = str(PTH / "uncond.pth")
    assert cli.main(["convert", "tarflow", source, f"--out={tmp_path}/a", *sizes, *given]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["noise"]["kind"], config["flow"]["pixel_scale"]) == (kind, scale)


def test_other_sizes_arrive_in_the_workdir(tmp_path):
    given = [*BIG_VISION, "--scale_factor=1.5"]
    assert cli.main(["convert", "jet", str(WORKDIR), f"--out={tmp_path}/jet", *given]) == 0
    assert load_model(tmp_path / "jet").flow.blocks[0].scale_factor == 1.5
    given = [*tarflow_flags("uncond"), "--head_dim=16"]
    source = str(PTH / "uncond.pth")
    assert cli.main(["convert", "tarflow", source, f"--out={tmp_path}/tar", *given]) == 0
    assert load_model(tmp_path / "tar").flow.blocks[0].num_heads == 4


def test_noisy_workdir_is_sampled_and_evaluated(noisy, tmp_path, compilation_cache, capsys):
    name, workdir, _ = noisy
    images = tmp_path / "a.npz"
    guidance = ["--guidance=1", "--attention_temperature=1.5", "--denoise", f"--npz={images}"]
    out = f"--out={tmp_path}/a.png"
    assert cli.main(["sample", f"--workdir={workdir}", "--num=4", *guidance, out]) == 0
    assert np.load(images)["images"].shape == (4, 8, 8, 3)
    metrics = ["--metrics=bpd,noised_bpd", "--draws=1"]
    if name == "cond":
        assert cli.main(["evaluate", f"--workdir={workdir}", *metrics]) == 2
        return
    assert cli.main(["evaluate", f"--workdir={workdir}", *metrics]) == 0
    results = [json.loads(path.read_text()) for path in (workdir / "evals").glob("*.json")]
    values = {result["metric"]: result for result in results}
    assert values["noised_bpd"]["noise"] == {"kind": "gaussian", "std": 0.05}
    assert values["bpd"]["data"]["name"] == "photos/8"
    assert all(np.isfinite(result["value"]) for result in results)


TINY = {"train.steps": 1, "optim.lr": 1e-9, "eval.draws": 1, "eval.samples": 4}
TINY |= {"train.batch_size": 8, "train.ema_decay": 0.5}


def trains_on(printed: str, config: str, workdir: Path, **fields) -> None:
    """The command that `convert` prints, with a config file and for one step."""
    (line,) = [line for line in printed.splitlines() if line.startswith("train it on: jetflow ")]
    _, *arguments = shlex.split(line.partition("jetflow ")[2])
    arguments[1] = str(CONFIGS / config)
    arguments[arguments.index("…")] = str(workdir)
    settings = TINY | {name.replace("__", "."): value for name, value in fields.items()}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", *arguments, *flags]) == 0


def assert_starts_from(workdir: Path, start) -> None:
    """With a learning rate of almost nothing, a training ends where it starts."""
    model = load_model(workdir)
    assert model.step == 1
    for one, other in zip(
        jax.tree.leaves(model.variables["params"]), jax.tree.leaves(start["params"]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_training_goes_on_from_a_tarflow(noisy, tmp_path, data_dir, compilation_cache):
    name, _, printed = noisy
    if name == "cond":  # no data set that ships with jetflow has five classes
        assert "--config.data.labels=True" in printed
        assert "convert it again with --data NAME" in printed
        return
    trains_on(printed, "photos_tarflow.py:8", tmp_path / "run")
    assert_starts_from(tmp_path / "run", case(name).variables)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["noise"]["std"] == 0.05 and config["flow"]["pixel_scale"] == 127.5


def test_training_goes_on_from_a_jet(jet_workdir, tmp_path, capsys, data_dir, compilation_cache):
    again = ["convert", "jet", str(WORKDIR), *BIG_VISION, f"--out={tmp_path}/a b"]
    assert cli.main(again) == 0
    printed = capsys.readouterr().out
    trains_on(printed, "photos_jet.py", tmp_path / "run", data__name="digits")
    assert_starts_from(tmp_path / "run", case("spatial_only").variables)


JET = {"flow.patch_size": 2, "flow.width": 32, "flow.num_heads": 4, "flow.num_couplings": 6}
JET |= {"flow.block_depth": 2, "data.name": "digits", "flow.kinds": "('spatial',)"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"flow.num_heads": 2}, "another flow: config.flow.num_heads is 4 there and 2 here"),
        ({"flow.width": 64, "flow.scale_factor": 1.5},
         "config.flow.width is 32 there and 64 here, config.flow.scale_factor is 2.0 there and"),
        ({"flow.num_couplings": 7}, "config.flow.num_couplings is 6 there and 7 here"),
        ({"init_from": "none"}, "config.init_from is none: no run in none"),
    ],
)  # fmt: skip
def test_training_from_another_flow_is_refused(fields, said, jet_workdir, tmp_path, capsys):
    settings = TINY | JET | {"init_from": jet_workdir} | fields
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = str(CONFIGS / "photos_jet.py")
    assert cli.main(["train", "--config", config, f"--workdir={tmp_path}/run", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pixel_scale_that_differs_is_named(noisy, tmp_path, capsys):
    """Alone: depths that are spelled in another way do not differ."""
    name, workdir, _ = noisy
    flow = {"patch_size": 4, "width": 64, "num_blocks": 2, "layers_per_block": "(2,)"}
    flow |= {"volume_preserving": True}
    if name == "cond":
        flow |= {"patch_size": 2, "num_blocks": 3, "volume_preserving": False}
    settings = TINY | {f"flow.{field}": value for field, value in flow.items()}
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    arguments = ["--config", f"{CONFIGS}/photos_tarflow.py:8", f"--workdir={tmp_path}/run"]
    assert cli.main(["train", *arguments, *flags, f"--config.init_from={workdir}"]) == 2
    differs = "another flow: config.flow.pixel_scale is 127.5 there and 128.0 here"
    assert f"{differs}; set what is there" in capsys.readouterr().err


SIZES = ["--image_size=8", "--channels=3", "--patch_size=2"]


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
        (["tarflow", "a", "--out=b", *SIZES], "--noise_std is missing; expected --noise_std 0.05"),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=nan"], "--noise_std is nan; expected 0"),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=0", "--pixel_scale=-3"],
         "pixel_scale is -3.0; expected a number above 0"),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=0", "--pixel_scale=0"],
         "pixel_scale is 0.0; expected a number above 0"),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=0", "--scale_factor=2"],
         "--scale_factor is for jet, not for tarflow; leave it out"),
        (["jet", "a", "--out=b", *BIG_VISION, "--scale_factor=-1"], "scale_factor is -1.0; expe"),
        (["jet", str(WORKDIR), "--out=b", *BIG_VISION, "--data=digit"],
         "--data is 'digit'; known data sets: digits"),
        (["jet", str(WORKDIR), "--out=b", *BIG_VISION, "--data=photos/8"],
         "--data photos/8 has images of (8, 8, 3), but the model is for (8, 8, 1); give a"),
        (["jet", str(WORKDIR), f"--out={__file__}", *BIG_VISION], "command.py is no folder"),
        (["jet", str(WORKDIR), f"--out={__file__}/a", *BIG_VISION], "is no folder that can"),
        (["jet", str(WORKDIR), "--out=/proc/a", *BIG_VISION], "--out /proc/a cannot be written ("),
        (["tarflow", "a", "--out=b", *SIZES, "--noise_std=0"], "a cannot be read"),
        (["--reverse", "tarflow", "a", "--out=b.pth"], "no run in a"),
        (["--reverse", "tarflow", "a", "--out=b.pth", "--noise_std=0"],
         "--noise_std has no effect with --reverse; leave it out"),
        (["--reverse", "tarflow", "a", "--out=b.pth", "--data="], "--data has no effect with"),
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


def test_classes_of_the_data_must_be_the_models(tmp_path, capsys):
    tensors = torch_file.read(PTH / "uncond_vp.pth")
    published = Published({}, (8, 8, 1), num_classes=5, variables=tensors)
    with pytest.raises(UsageError, match="--data digits has 10 classes, but the model has 5"):
        convert.check_data("digits", published)
    convert.check_data("digits", published._replace(num_classes=10))
    convert.check_data("digits", published._replace(num_classes=0))


def reverse(workdir: Path, out: Path) -> int:
    return cli.main(["convert", "--reverse", "tarflow", str(workdir), "--out", str(out)])


def test_jet_cannot_be_written_as_tarflow(jet_workdir, tmp_path, capsys):
    assert reverse(jet_workdir, tmp_path / "a.pth") == 2
    assert "only a TarFlow can be written" in capsys.readouterr().err


def test_other_heads_cannot_be_written_back(trained, tmp_path, capsys):
    """The published code would read the tensors, as another model."""
    assert reverse(trained("tarflow"), tmp_path / "a.pth") == 2
    said = "config.flow.head_dim is 16, but apple/ml-tarflow divides every width into heads of 64"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_written(noisy, capsys):
    _, workdir, _ = noisy
    assert reverse(workdir, Path("/proc/a.pth")) == 2
    assert "--out /proc/a.pth cannot be written" in capsys.readouterr().err


def test_held_out_split_of_every_data_set():
    for name, source in SOURCES.items():
        assert {"train", convert._held_out_split(name)} == set(source.splits)
