"""The commands: bad input in one line, help, and evaluations."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

from jetflow import cli
from jetflow.data import dataset as pipeline

pytestmark = pytest.mark.usefixtures("compilation_cache", "digits")


@pytest.fixture(scope="module")
def digits(data_dir):
    """Prepared, so that no test is the first and sees the line that says so."""
    return pipeline.load("digits", "test")


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """All that is in a folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(tmp_path, capsys):
    """A function: runs a command line that must fail; gives what is said.

    It fails as bad input should: one line, status 2, and nothing written.
    """

    def run(arguments, *folders):
        before = [files(folder) for folder in (tmp_path, *folders)]
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert [files(folder) for folder in (tmp_path, *folders)] == before
        assert "Traceback" not in line and "\\" not in line
        return line.removeprefix("jetflow: ")

    return run


# What is wrong -> the flow, its fields, and what must be said: the field, what came, the remedy.
BAD_FIELDS = {
    "unknown field": (
        "tarflow",
        {"train.stpes": 3},
        ["config.train.stpes is no field", "did you mean steps?"],
    ),
    "unknown section": (
        "tarflow",
        {"trian.steps": 3},
        ["config.trian.steps is no field", "did you mean train?"],
    ),
    "field of the other flow": (
        "jet",
        {"flow.layers_per_block": 3},
        ["config.flow.layers_per_block is no field", "configs/base.py"],
    ),
    "other flow": (
        "tarflow",
        {"flow.kind": "jet"},
        ["config.flow.head_dim is no field of a jet; it has patch_size,"],
    ),
    "no flow": ("tarflow", {"flow.kind": "glow"}, ["config.flow.kind is 'glow'", "jet, tarflow"]),
    "word for a whole number": (
        "tarflow",
        {"train.steps": "many"},
        ["config.train.steps is 'many'; expected a whole number"],
    ),
    "fraction for a whole number": (
        "tarflow",
        {"train.steps": 1.5},
        ["config.train.steps is '1.5'; expected a whole number"],
    ),
    "word for a number": (
        "tarflow",
        {"optim.lr": "high"},
        ["config.optim.lr is 'high'; expected a number"],
    ),
    "word for true or false": (
        "tarflow",
        {"data.labels": "maybe"},
        ["config.data.labels is 'maybe'; expected true or false"],
    ),
    "number of layers": (
        "tarflow",
        {"flow.layers_per_block": 0},
        ["config.flow.layers_per_block is (0,); expected numbers above 0"],
    ),
    "numbers of layers": (
        "tarflow",
        {"flow.layers_per_block": "(1, 2, 3)"},
        ["config.flow.layers_per_block has 3 entries for 2 blocks", "one a block"],
    ),
    "value for a section": ("tarflow", {"mesh": 3}, ["config.mesh is '3'"]),
    "image not divisible by patch": (
        "tarflow",
        {"flow.patch_size": 3},
        ["image height 8 is not divisible by patch 3", "config.flow.patch_size to a divisor of 8"],
    ),
    "odd number of tokens": (
        "jet",
        {"flow.patch_size": 8},
        ["spatial split", "1x1 patches", "config.flow.patch_size", "config.flow.kinds"],
    ),
    "unknown split kind": (
        "jet",
        {"flow.kinds": "('channels', 'rows')"},
        ["config.flow.kinds is ('channels', 'rows')", "'spatial'"],
    ),
    "unknown data set": (
        "tarflow",
        {"data.name": "digist"},
        ["config.data.name is 'digist'", "photos/16", "did you mean 'digits'?"],
    ),
    "unknown split": (
        "tarflow",
        {"data.train_split": "validation"},
        ["'validation' is not a split", "train (1,500), test (297)"],
    ),
    "batch not divisible by accumulation": (
        "tarflow",
        {"train.accumulation": 3},
        ["config.train.batch_size 16 is not divisible by config.train.accumulation 3", "set one"],
    ),
    "no accumulation": ("tarflow", {"train.accumulation": 0}, ["config.train.accumulation 0"]),
    "empty batch": ("tarflow", {"train.batch_size": 0}, ["config.train.batch_size is 0"]),
    "wrong mesh": ("tarflow", {"mesh.fsdp": 2}, ["config.mesh", "fsdp=2", "1 devices", "-1"]),
    "two lengths": (
        "tarflow",
        {"train.epochs": 3},
        ["exactly one of config.train.steps", "got steps=12, epochs=3", "set the others to 0"],
    ),
    "no length": (
        "tarflow",
        {"train.steps": 0},
        ["exactly one of config.train.st", "all are 0; set one"],
    ),
    "negative length": ("tarflow", {"train.steps": -5}, ["above 0", "steps=-5"]),
    "unknown noise": ("tarflow", {"noise.kind": "pink"}, ["config.noise.kind is 'pink'"]),
    "uniform noise with a width": (
        "tarflow",
        {"noise.kind": "uniform"},
        ["config.noise.std is 0.1 with uniform noise"],
    ),
    "label drop without labels": (
        "tarflow",
        {"data.labels": False},
        ["config.noise.label_drop is 0.2", "config.data.labels=True"],
    ),
    "guidance without labels or temperature": (
        "volume preserving",
        {"eval.guidance": 1},
        ["guidance of a flow without labels", "temperature other than 1"],
    ),
    "guidance of Jet": (
        "jet",
        {"eval.guidance": 1},
        ["guidance is 1.0, but needs", "set it to 0"],
    ),
    "denoising of uniform noise": (
        "jet",
        {"eval.denoise": True},
        ["config.eval.denoise needs gaussian noise", "'uniform'"],
    ),
    "heads": (
        "jet",
        {"flow.num_heads": 3},
        ["config.flow.width 32 is not divisible by num_heads 3", "config.flow.num_heads"],
    ),
    "blocks": ("tarflow", {"flow.num_blocks": 0}, ["config.flow.num_blocks is 0", "1 or more"]),
    "type of the net": ("tarflow", {"flow.dtype": "int8"}, ["config.flow.dtype is 'int8'"]),
    "learning rate": (
        "tarflow",
        {"optim.lr": -1},
        ["config.optim.lr is -1.0", "number above 0"],
    ),
    "endless rate": ("tarflow", {"optim.lr": "inf"}, ["config.optim.lr is inf", "finite"]),
    "large seed": (
        "tarflow",
        {"train.seed": 2**32},
        ["train.seed is 4294967296; expected 0 to"],
    ),
    "moment's type": ("tarflow", {"optim.mu_dtype": "x"}, ["config.optim.mu_dtype is 'x'"]),
    "averaging": ("tarflow", {"train.ema_decay": 1}, ["config.train.ema_decay is 1.0", "< 1"]),
    "interval": ("tarflow", {"train.log_every": 0}, ["config.train.log_every is 0", "1 or more"]),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields(case, refused, tmp_path):
    name, fields, messages = BAD_FIELDS[case]
    arguments = tiny_runs.arguments(name, tmp_path / "new" / "run")
    # In the place of the flow's own: a tuple's values would be joined.
    arguments = [a for a in arguments if a.partition("=")[0][9:] not in fields]
    message = refused([*arguments, *(f"--config.{key}={value}" for key, value in fields.items())])
    for part in messages:
        assert part in message


CONFIG = str(tiny_runs.ROOT / "configs" / "digits_tarflow.py")

BAD_COMMANDS = {
    "unknown command": (["trian"], ["'trian' is no command", "train, sample, evaluate"]),
    "flag for a command": (["--workdir", "x"], ["'--workdir' is no command"]),
    "unknown flag": (
        ["sample", "--workdirr", "x"],
        ["workdirr", "workdir", "jetflow sample --help"],
    ),
    "stray argument": (["evaluate", "x", "--workdir", "y"], ["'x'", "jetflow evaluate --help"]),
    "no config": (["train", "--workdir", "x"], ["--config is missing", "configs/NAME.py"]),
    "no workdir": (["train", "--config", CONFIG], ["--workdir is missing", "runs/NAME"]),
    "no workdir to sample": (["sample"], ["--workdir is missing"]),
    "no value": (["sample", "--workdir"], ["workdir"]),
    "no config file": (
        ["train", "--config", "configs/digit.py", "--workdir", "x"],
        ["'configs/digit.py' is no file"],
    ),
    "no name of a config file": (["train", "--config=", "--workdir", "x"], ["--config ''"]),
    "argument of a config without one": (
        ["train", "--config", CONFIG + ":16", "--workdir", "x"],
        ["digits_tarflow.py", "get_config() takes 0 positional arguments"],
    ),
    "field before the config": (
        ["train", "--config.train.steps=3", "--config", CONFIG, "--workdir", "x"],
        ["--config.train.steps=3", "before a value for --config"],
    ),
    "no run to sample": (
        ["sample", "--workdir", "nothing"],
        ["no run in nothing", "jetflow train --config … --workdir nothing"],
    ),
    "no run to evaluate": (["evaluate", "--workdir", "nothing"], ["no run in nothing"]),
    "no images": (["sample", "--workdir", "x", "--num", "0"], ["--num=0", "positive"]),
    "word for a number": (["sample", "--workdir", "x", "--num", "all"], ["--num is 'all'"]),
    "negative guidance": (["sample", "--workdir", "x", "--guidance=-1"], ["--guidance=-1"]),
    "unknown metric": (
        ["evaluate", "--workdir", "x", "--metrics", "fidd"],
        ["metrics is 'fidd'", "bpd, noised_bpd"],
    ),
    "no metric": (["evaluate", "--workdir", "x", "--metrics="], ["metrics is empty", "bpd"]),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands(case, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, messages = BAD_COMMANDS[case]
    message = refused(arguments)
    for part in messages:
        assert part in message


BAD_FILES = {
    "syntax": ("def get_config(:\n", "line 1: SyntaxError"),
    "missing import": ("import missing_module\n", "line 1: ModuleNotFoundError: No module named"),
    "error": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by"),
    "wrong type": (
        "from configs import base\n\ndef get_config():\n    config = base.jet()\n"
        "    config.train.steps = 'many'\n    return config\n",
        "line 5: TypeError: ",
    ),
    "unknown field": (
        "from configs import base\n\ndef get_config():\n    config = base.jet()\n"
        "    config.train.stpes = 3\n    return config\n",
        "line 5: the config has no field stpes; did you mean steps?",
    ),
    "no function": ("x = 1\n", "has no function get_config; see configs/digits_tarflow.py"),
    "no result": ("def get_config():\n    pass\n", "returns no config"),
    "no sections": (
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict()\n",
        "has no section flow; start from configs/base.py",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_files(case, refused, tmp_path, monkeypatch):
    # As in a process of its own, which has seen no other config file.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tiny_runs.ROOT)])
    content, expected = BAD_FILES[case]
    path = tmp_path / "experiment.py"
    path.write_text(content)
    message = refused(["train", "--config", path, "--workdir", tmp_path / "run"])
    assert str(path) in message
    assert expected in message


def test_unwritable_workdir(refused, tmp_path):
    (tmp_path / "file").touch()
    message = refused(tiny_runs.arguments("tarflow", tmp_path / "file" / "run"))
    assert f"--workdir {tmp_path / 'file' / 'run'} cannot be written" in message


def test_data_that_cannot_be_prepared(tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "data")
    arguments = [*tiny_runs.arguments("tarflow", tmp_path / "run"), "--data_dir", folder]
    assert cli.main(arguments) == 2
    notice, message = capsys.readouterr().err.splitlines()
    assert notice.startswith("preparing data set digits in ")
    assert "data set 'digits' was not found" in message
    assert folder in message and "set TFDS_DATA_DIR to a writable directory" in message
    assert not (tmp_path / "run").exists()


def test_labels_of_data_that_has_none(tmp_path, capsys):
    arguments = tiny_runs.arguments("tarflow", tmp_path / "run", data__name="photos/8")
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "config.data.labels is True, but data set photos/8 has no labels" in message
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config(refused, trained):
    workdir = trained("tarflow")
    message = refused(tiny_runs.arguments("tarflow", workdir, optim__lr=0.5), workdir)
    assert f"{workdir} holds a run with another config" in message
    assert "config.optim.lr is 0.002 there and 0.5 here" in message
    assert "another --workdir" in message
    message = refused(tiny_runs.arguments("jet", workdir), workdir)
    assert "config.flow.kind" in message or "more" in message


def test_a_run_that_made_no_step_gives_way(trained, tmp_path):
    shutil.copy(trained("tarflow") / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert tiny_runs.train("tarflow", tmp_path, optim__lr=0.5, train__steps=1) == 0
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.5


def test_a_lost_config_is_found_in_the_checkpoints(trained, tmp_path):
    shutil.copytree(trained("tarflow") / "checkpoints", tmp_path / "checkpoints")
    assert cli.main(["evaluate", "--workdir", str(tmp_path), "--draws=1"]) == 0


def test_unreadable_config_of_a_run(refused, trained, tmp_path):
    (tmp_path / "config.json").write_text('{"flow": ')
    for arguments in (tiny_runs.arguments("tarflow", tmp_path), ["sample", "--workdir", tmp_path]):
        message = refused(arguments)
        assert f"{tmp_path / 'config.json'} is not readable JSON" in message


def test_no_checkpoint(refused, trained, tmp_path):
    shutil.copy(trained("tarflow") / "config.json", tmp_path)
    for command in ("sample", "evaluate"):
        message = refused([command, "--workdir", tmp_path])
        assert f"no checkpoint in {tmp_path / 'checkpoints'}; train first" in message


# The flow that is sampled from, the flags, and what must be said.
BAD_SAMPLES = {
    "label too large": ("tarflow", ["--label", 10], "label 10 is out of range; expected 0 to 9"),
    "label too small": ("jet", ["--label=-2"], "label -2 is out of range; expected 0 to 9"),
    "label without labels": ("volume preserving", ["--label", 1], "trained without labels"),
    "guidance without labels": (
        "volume preserving",
        ["--guidance", 1],
        "needs an attention temperature other than 1",
    ),
    "guidance of Jet": ("jet", ["--guidance", 1], "guidance is 1.0, but needs a TarFlow"),
    "endless guidance": ("tarflow", ["--guidance", "inf"], "guidance is inf; expected a finite"),
    "no temperature": ("tarflow", ["--temperature", "nan"], "temperature is nan; expected 0 or"),
    "large seed": ("tarflow", ["--seed", 2**70], "--seed"),
    "no picture": ("tarflow", ["--out", "images.npz"], "--out is images.npz; expected a file"),
    "window": ("tarflow", ["--method", "jacobi", "--window", 0], "window"),
    "method of Jet": ("jet", ["--method", "auto"], "Jet is inverted in one pass"),
    "strength without denoising": ("tarflow", ["--denoise_std", 0.1], "--denoise is missing"),
    "arrays of a trace": ("tarflow", ["--mode=trace", "--npz=a.npz"], "--npz is for samples"),
    "pictures of a trace": ("tarflow", ["--mode=trace", "--images=a.png"], "--images is for recon"),
    "no picture file": (
        "tarflow",
        ["--mode=reconstruct", "--images=a.png"],
        "not a readable",
    ),
    "picture of another size": (
        "tarflow",
        ["--mode=reconstruct", f"--images={tiny_runs.ROOT}/docs/digits.png"],
        "this flow needs 8x8",
    ),
    "guided by nothing": ("tarflow", ["--guidance", 1, "--guide_what", "c"], "'c'; expected a"),
    "temperature": (
        "tarflow",
        ["--guidance", 1, "--attention_temperature", 0],
        "attention temperature is 0.0; expected more than 0",
    ),
    "denoising of uniform noise": ("jet", ["--denoise"], "needs a flow trained with gaussian"),
    "no such step": ("jet", ["--step", 7], "no checkpoint of step 7"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples(case, refused, trained, tmp_path):
    name, flags, expected = BAD_SAMPLES[case]
    workdir, out = trained(name), tmp_path / "new" / "grid.png"
    assert expected in refused(["sample", "--workdir", workdir, "--out", out, *flags], workdir)


@pytest.mark.parametrize("flag", ["out", "npz"])
def test_nowhere_to_write_samples(flag, refused, trained, tmp_path):
    (tmp_path / "file").touch()
    places = {"out": tmp_path / "grid.png", flag: tmp_path / "file" / "x"}
    flags = [part for name, place in places.items() for part in (f"--{name}", place)]
    message = refused(["sample", "--workdir", trained("tarflow"), *flags])
    assert f"--{flag} {tmp_path / 'file' / 'x'} cannot be written" in message


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("jet", ["--metrics", "noised_bpd"], "noised_bpd is for flows trained with gaussian noise"),
        ("volume preserving", ["--metrics", "accuracy"], "accuracy is for flows with labels"),
        ("jet", ["--split", "validation"], "'validation' is not a split"),
        ("jet", ["--step", 7], "no checkpoint of step 7"),
        ("jet", ["--mesh", "fsdp:4"], "--mesh has 'fsdp:4'; expected AXIS=SIZE"),
        ("jet", ["--mesh", "model=4"], "--mesh has 'model=4'; expected AXIS=SIZE"),
        ("jet", ["--mesh", "fsdp=4"], "--mesh has data=-1, fsdp=4, tensor=1, but there are 1 dev"),
    ],
)
def test_bad_evaluations(name, flags, expected, refused, trained):
    workdir = trained(name)
    assert expected in refused(["evaluate", "--workdir", workdir, *flags], workdir)


FOUR_DEVICES = """
import sys
from jetflow.cli import main
for arguments in map(str.split, sys.argv[1:]):
    print(main(arguments))
"""


def test_batches_not_divisible_by_devices(trained, tmp_path):
    arguments = " ".join(tiny_runs.arguments("tarflow", tmp_path / "run"))
    process = subprocess.run(
        [
            *(sys.executable, "-c", FOUR_DEVICES),
            f"{arguments} --config.train.batch_size=18",
            f"{arguments} --config.train.accumulation=8",
            f"{arguments} --config.eval.batch_size=30",
            f"{arguments} --config.mesh.fsdp=3",
            f"evaluate --workdir {trained('tarflow')} --batch_size=30",
        ],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="4"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.split() == ["2"] * 5, process.stderr
    for message, expected in zip(
        process.stderr.splitlines(),
        [
            "config.train.batch_size 18 / accumulation 2 is not divisible by the 4 devices that a "
            "batch is split over; set config.train.batch_size to a multiple of 8",
            "config.train.batch_size 16 / accumulation 8 is not divisible by the 4 devices that a "
            "batch is split over; set config.train.batch_size to a multiple of 32",
            "config.eval.batch_size 30 is not divisible by the 4 devices that a batch "
            "is split over; "
            "set config.eval.batch_size to a multiple of 4",
            "config.mesh has data=-1, fsdp=3, tensor=1, but there are 4 devices",
            "--batch_size 30 is not divisible by the 4 devices that a batch "
            "is split over; "
            "set --batch_size to a multiple of 4",
        ],
        strict=True,
    ):
        assert message.startswith(f"jetflow: {expected}")
    assert not (tmp_path / "run").exists()


def test_a_process_says_it_in_one_line():
    process = tiny_runs.start(["sample", "--workdir", "nothing", "--num=x"])
    line = "jetflow: --num is 'x'; expected a whole number\n"
    assert process.communicate(timeout=60) == ("", line)
    assert process.returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], []])
def test_help(arguments, capsys):
    assert cli.main(arguments) == (0 if arguments else 2)
    text = capsys.readouterr().out
    for name, summary in cli.SUMMARIES.items():
        assert f"  {name} " in text and summary in text


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train", ["config", "workdir", "data_dir"]),
        ("sample", ["workdir", "num", "label", "guidance", "temperature", "denoise", "out"]),
        ("sample", ["npz", "seed", "step", "attention_temperature", "guide_what", "annealed"]),
        ("evaluate", ["workdir", "metrics", "split", "draws", "seed", "batch_size", "step"]),
    ],
)
@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_of_commands(name, flags, asked, capsys):
    assert cli.main([name, asked]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert cli.load(name).USAGE in said.out
    for flag in flags:
        assert f"\n  --{flag}: " in said.out


@pytest.fixture
def evaluate(trained, tmp_path, capsys):
    """A function: evaluates a copy of a trained flow; gives what is said, and the JSON files."""
    workdir = tmp_path / "run"

    def run(name, *flags):
        if not workdir.exists():
            shutil.copytree(trained(name), workdir)
        shutil.rmtree(workdir / "evals", ignore_errors=True)
        assert cli.main(["evaluate", "--workdir", str(workdir), *map(str, flags)]) == 0
        results = {path.name: json.loads(path.read_text()) for path in workdir.glob("evals/*")}
        return capsys.readouterr().out, results

    return run


@pytest.mark.parametrize("name", ["jet", "tarflow"])
def test_evaluation_repeats_that_of_training(name, evaluate, trained):
    metric = "noised_bpd" if name == "tarflow" else "bpd"
    file = f"{metric}-{tiny_runs.STEPS:08d}.json"
    expected = json.loads((trained(name) / "evals" / file).read_text())
    _, results = evaluate(name, "--metrics", metric, "--draws", 2)
    (result,) = results.values()
    assert list(results) == [file]
    for key in ("value", "standard_error"):
        assert result[key] == pytest.approx(expected[key], rel=1e-5), key
    assert {**result, "value": 0, "standard_error": 0} == {
        **expected,
        "value": 0,
        "standard_error": 0,
    }


def test_evaluation(evaluate, digits):
    said, results = evaluate("tarflow", "--metrics", "bpd,noised_bpd", "--draws", 2)
    bpd, noised = (results[f"{name}-00000012.json"] for name in ("bpd", "noised_bpd"))
    assert bpd["metric"] == "bpd" and bpd["noise"] == {"kind": "uniform", "std": 0.0}
    assert noised["metric"] == "noised_bpd" and noised["noise"] == {"kind": "gaussian", "std": 0.1}
    for result in (bpd, noised):
        assert result["data"] == {
            "name": "digits",
            "version": "1.0.0",
            "split": "test",
            "examples": 297,
            "resize": "none",
            "checksum": digits.checksum(),
        }
        assert (result["step"], result["draws"], result["weights"]) == (12, 2, "ema")
        assert 0 < result["standard_error"] < 0.1
        assert 5 < result["value"] < 10
    assert bpd["value"] != noised["value"]
    lines = said.splitlines()
    assert lines[0].startswith(f"step 12: bpd {bpd['value']:.4f} ± {bpd['standard_error']:.2g} (")
    for part in ("digits 1.0.0 test", "297 images, resize: none", digits.checksum()):
        assert part in lines[0] and part in lines[2]
    assert lines[2].startswith(f"step 12: noised_bpd {noised['value']:.4f} ± ")
    assert "gaussian noise of std 0.1 added: not comparable" in lines[3]
    assert "gaussian" not in lines[0] + lines[1]


def test_evaluation_does_not_depend_on_the_batch_size(evaluate):
    values = []
    for batch_size in (128, 50):  # both leave a remainder
        _, results = evaluate("jet", "--batch_size", batch_size, "--draws", 1)
        (result,) = results.values()
        assert result["standard_error"] is None
        values.append(result["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    _, results = evaluate("jet", "--draws", 1, "--seed", 1)
    assert next(iter(results.values()))["value"] != pytest.approx(values[0], rel=1e-6)


def test_evaluation_of_another_split_leaves_the_run_its_own(evaluate):
    _, results = evaluate("jet", "--split", "test[:20]", "--draws", 1)
    ((file, result),) = results.items()
    assert file == "bpd-00000012-draws=1,split=test%5B%3A20%5D.json"
    assert (result["data"]["split"], result["data"]["examples"]) == ("test[:20]", 20)


def test_accuracy_of_a_flow_with_labels(evaluate):
    said, results = evaluate("tarflow", "--metrics", "accuracy", "--draws", 1)
    ((file, result),) = results.items()
    assert file == "accuracy-00000012-draws=1.json"
    assert 0 < result["value"] < 1 and 0 < result["standard_error"] < 0.05
    assert result["noise"] == {"kind": "gaussian", "std": 0.1}
    assert result["data"]["examples"] == 297
    assert said.startswith(f"step 12: accuracy {result['value']:.4f} ± ")


def test_gap_between_held_out_and_training_images(evaluate):
    said, results = evaluate("jet", "--metrics", "bpd,bpd_gap", "--draws", 2)
    bpd, gap = (results[f"{name}-00000012.json"] for name in ("bpd", "bpd_gap"))
    assert gap["held_out"] == pytest.approx(bpd["value"])
    assert gap["value"] == pytest.approx(gap["held_out"] - gap["train"])
    assert abs(gap["value"]) < 10 * gap["standard_error"] < 1
    assert gap["train_data"]["split"] == "train[:1485:5]"
    assert gap["train_data"]["examples"] == gap["data"]["examples"] == 297
    assert gap["train_data"]["checksum"] != gap["data"]["checksum"]
    assert bpd["importance_weighted"] < bpd["value"]
    parts = bpd["parts"]
    assert len(parts["blocks"]) == 5
    total = parts["prior"] + parts["pixels"] + sum(parts["blocks"])
    assert total == pytest.approx(bpd["value"], rel=1e-5)
    assert "bpd_gap" in said
