"""The command line: bad input in one line, options and their flags, help."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from jetflow import cli
from jetflow.cli.flags import Command, help_text, parse
from jetflow.data import dataset as pipeline
from jetflow.options import Options, option
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("compilation_cache", "digits")

CONFIG = str(tiny_runs.ROOT / "configs" / "digits_tarflow.py")


@pytest.fixture(scope="module")
def digits(data_dir):
    """Prepared, so that no test is the first and sees the line about it."""
    return pipeline.load("digits", "test")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """A function: runs a command line that must fail, in a folder of its own; gives the message.

    It must fail as bad input should: one line, status 2, nothing written.
    """
    monkeypatch.chdir(tmp_path)

    def run(arguments, *folders):
        before = [files(folder) for folder in (tmp_path, *folders)]
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert [files(folder) for folder in (tmp_path, *folders)] == before
        assert "Traceback" not in line
        return line

    return run


# Command lines, where JET, TARFLOW and PLAIN are trained runs, the last one without labels; and a
# part of each message: the name of what is wrong, what came, or the remedy.
REFUSED = [
    ("trian", "'trian' is no command; expected one of prepare, train"),
    ("--workdir x", "'--workdir' is no command"),
    ("train --workdir x", "--config is missing; expected --config configs/NAME.py"),
    (f"train --config {CONFIG}", "--workdir is missing; expected --workdir runs/NAME"),
    ("train --config digit.py --workdir x", "'digit.py' is no file"),
    (f"train --config {CONFIG}:16 --workdir x", "get_config() takes 0 positional arguments"),
    ("train --config.train.steps=3 --workdir x", "give --config FILE.py"),
    (f"train --config {CONFIG} --train 3 --workdir x", "fields of the config are --config.train."),
    (f"train --config {CONFIG} --workdir x y", "unexpected argument 'y'; see `jetflow train --he"),
    (f"train --config {CONFIG} --workdir file/x", "file/x cannot be used"),
    ("sample", "--workdir is missing"),
    ("sample --workdirr x", "did you mean --workdir?"),
    ("sample --workdir", "workdir"),
    ("sample --workdir nothing", "no run in nothing"),
    ("sample --workdir JET --num all", "--num is 'all'; expected a whole number"),
    ("sample --workdir JET --num 0", "num is 0"),
    ("sample --workdir JET --step 7", "no checkpoint of step 7"),
    ("sample --workdir JET --guidance 1", "guidance is 1.0, but needs a TarFlow"),
    ("sample --workdir JET --denoise", "gaussian"),
    ("sample --workdir TARFLOW --label 10", "label 10 is out of range; expected 0 to 9"),
    ("sample --workdir PLAIN --label 1", "trained without labels"),
    ("sample --workdir TARFLOW --out file/x.png", "out file/x.png cannot be written"),
    ("evaluate --workdir nothing", "no run in nothing"),
    ("evaluate --workdir JET --metrics fidd", "metrics is 'fidd'"),
    ("evaluate --workdir JET --metrics noised_bpd", "noised_bpd is for flows trained with gaussia"),
    ("evaluate --workdir JET --split validation", "'validation' is not a split"),
    ("evaluate --workdir JET --mesh fsdp:4", "mesh has 'fsdp:4'; expected AXIS=SIZE"),
    ("sweep --workdir x", "--sweep is missing"),
    ("sweep --sweep nothing.py --workdir x", "'nothing.py' is no file"),
    ("report nothing", "nothing is no folder"),
    (f"plan --config {CONFIG} --topology v9:2x2", "v9"),
    ("bench sampling", "expected jetflow bench followed by one of"),
    ("bench train", "--config is missing"),
    ("convert tarflow", "missing"),
    ("prepare digist", "digist"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refusals(line, message, refused, trained, tmp_path):
    (tmp_path / "file").touch()
    runs = {"JET": "jet", "TARFLOW": "tarflow", "PLAIN": "volume preserving"}
    folders = [trained(runs[word]) for word in line.split() if word in runs]
    words = [str(trained(runs[word])) if word in runs else word for word in line.split()]
    assert message in refused(words, *folders)


# Of a training: the flow, its fields, and the message.
BAD_FIELDS = [
    ("tarflow", {"train.stpes": 3}, "config.train.stpes is no field of the config; did you mean s"),
    ("tarflow", {"trian.steps": 3}, "config.trian.steps is no field of the config; did you mean t"),
    ("jet", {"flow.layers_per_block": 3}, "no field of the config; configs/base.py lists them"),
    ("tarflow", {"mesh": 3}, "config.mesh is '3'; expected the name of a field after it"),
    ("tarflow", {"train.steps": 1.5}, "config.train.steps is '1.5'; expected a whole number"),
    ("tarflow", {"optim.lr": "high"}, "config.optim.lr is 'high'; expected a number"),
    ("tarflow", {"data.labels": "maybe"}, "config.data.labels is 'maybe'; expected true or false"),
    ("jet", {"flow.kinds": "(channels"}, "config.flow.kinds is '(channels'; expected values in br"),
    ("tarflow", {"flow.kind": "jet"}, "config.flow.head_dim is no field of a jet; it has patch_si"),
    ("tarflow", {"flow.kind": "glow"}, "config.flow.kind is 'glow'"),
    ("tarflow", {"flow.layers_per_block": "(1, 2, 3)"}, "has 3 entries for 2 blocks"),
    ("tarflow", {"flow.patch_size": 3}, "image height 8 is not divisible by patch 3"),
    ("jet", {"flow.patch_size": 8}, "spatial split"),
    ("tarflow", {"data.name": "digist"}, "config.data.name is 'digist'"),
    ("tarflow", {"data.train_split": "validation"}, "'validation' is not a split"),
    ("tarflow", {"train.accumulation": 3}, "16 is not divisible by config.train.accumulation 3"),
    ("tarflow", {"train.batch_size": 0}, "config.train.batch_size is 0"),
    ("tarflow", {"mesh.fsdp": 2}, "fsdp=2, tensor=1, but there are 1 devices"),
    ("tarflow", {"train.epochs": 3}, "got steps=12, epochs=3; set the others to 0"),
    ("tarflow", {"noise.kind": "uniform"}, "config.noise.std is 0.1 with uniform noise"),
    ("tarflow", {"data.labels": False}, "config.noise.label_drop is 0.2, but the flow has no labe"),
    ("volume preserving", {"eval.guidance": 1}, "config.eval.guidance of a flow without labels"),
    ("jet", {"eval.denoise": True}, "config.eval.denoise needs a flow trained with gaussian n"),
    ("jet", {"flow.num_heads": 3}, "config.flow.width 32 is not divisible by num_heads 3"),
    ("tarflow", {"flow.num_blocks": 0}, "config.flow.num_blocks is 0; expected 1 or more"),
    ("tarflow", {"optim.lr": "inf"}, "config.optim.lr is inf; expected a finite number above 0"),
    ("tarflow", {"train.seed": 2**32}, "config.train.seed is 4294967296; expected 0 to"),
    ("tarflow", {"train.ema_decay": 1}, "config.train.ema_decay is 1.0; expected 0 <= value < 1"),
    ("tarflow", {"init_from": "nothing"}, "config.init_from is nothing: no run in nothing"),
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD_FIELDS)
def test_bad_fields(name, fields, message, refused, tmp_path):
    fields = {key.replace(".", "__"): value for key, value in fields.items()}
    assert message in refused(tiny_runs.arguments(name, tmp_path / "new" / "run", **fields))


START = "from configs import base\n\ndef get_config():\n    config = base.jet()\n"
BAD_FILES = {
    "def get_config(:\n": ", line 1: SyntaxError",
    "import missing_module\n": ", line 1: ModuleNotFoundError: No module named 'missing_module'",
    START + "    config.train.steps = 'many'\n    return config\n": ", line 5: TypeError: ",
    START + "    config.train.stpes = 3\n": 'line 5: AttributeError: .*Did you mean "steps"',
    START: " has a get_config that returns no config",
    "x = 1\n": " has no function get_config",
    START
    + "    config.unlock()\n    del config.init_from\n    return config\n": "no field init_from",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_config_files(content, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tiny_runs.ROOT)])
    path = tmp_path / "experiment.py"
    path.write_text(content)
    message = refused(["train", "--config", path, "--workdir", tmp_path / "run"])
    start, *rest = BAD_FILES[content].split(".*")
    assert f"--config {path}" in message
    assert start in message and all(part in message for part in rest)


def test_data_that_cannot_be_prepared(tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "data")
    arguments = [*tiny_runs.arguments("tarflow", tmp_path / "run"), "--data_dir", folder]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "digits" in message and folder in message
    assert not (tmp_path / "run").exists()


def test_refusals_of_four_devices(tmp_path):
    fields = ["train.batch_size=18", "train.accumulation=8", "eval.batch_size=30", "mesh.fsdp=3"]
    program = "import sys; from jetflow.cli import main\n" + (
        "for field in sys.argv[1].split(): print(main([*sys.argv[2:], '--config.' + field]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, " ".join(fields),
         *tiny_runs.arguments("tarflow", tmp_path / "run")],
        env=tiny_runs.environment(JAX_NUM_CPU_DEVICES="4"),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert process.stdout.split() == ["2"] * 4, process.stderr
    starts = [
        "config.train.batch_size 18 / accumulation 2 is not divisible by the 4 devices that a batch"
        " is split over; set config.train.batch_size to a multiple of 8",
        "config.train.batch_size 16 / accumulation 8 is not divisible by the 4 devices",
        "config.eval.batch_size 30 is not divisible by the 4 devices",
        "config.mesh has data=-1, fsdp=3, tensor=1, but there are 4 devices",
    ]
    for line, start in zip(process.stderr.splitlines(), starts, strict=True):
        assert line.startswith(f"jetflow: {start}")
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    for arguments, status in (["--help"], 0), ([], 2):
        assert cli.main(arguments) == status
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.SUMMARIES)
    for name, summary in cli.SUMMARIES.items():
        assert cli.main([name, "--help"]) == 0
        printed = capsys.readouterr()
        assert printed.err == "" and printed.out.startswith(summary) and "\n  --" in printed.out


def test_a_process_has_the_same_status_and_line():
    process = tiny_runs.start(["sample", "--workdir", "nothing", "--num=x"])
    line = "jetflow: --num is 'x'; expected a whole number\n"
    assert process.communicate(timeout=900) == ("", line)
    assert process.returncode == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Options):
    place: Path = option(help="given by its place", example="DIR")
    count: int = option(3, "a number", least=1, most=9)
    rate: float | None = option(None, "another", least=0.0)
    sizes: tuple[int, ...] = option((1, 2), "several", least=1)
    what: str = option("a", "one of two", choices=("a", "b"))
    quick: bool = option(False, "a switch")
    config: Any = option(None)


COMMAND = Command("jetflow try DIR", Everything, lambda options: None, ("place",))


def test_a_command_line_becomes_options():
    assert parse(COMMAND, ["try", "x"]) == Everything(place=Path("x"))
    line = "try --count=4 x --rate 1e-3 --sizes 3,4 --what=b --quick"
    expected = Everything(place=Path("x"), count=4, rate=1e-3, sizes=(3, 4), what="b", quick=True)
    assert parse(COMMAND, line.split()) == expected
    assert expected.changed("count", "what", "config") == {"count": 4, "what": "b"}


def test_fields_of_a_config_are_changed_in_order():
    changes = ["--config.train.steps", "7", "--config.data.labels=false", "--config.noise.flip"]
    changes += ["--config.flow.layers_per_block=2", "--config.train.steps=8"]
    config = parse(COMMAND, ["try", *changes, "x", "--config", CONFIG]).config
    assert (config.train.steps, config.data.labels, config.noise.flip) == (8, False, True)
    assert config.flow.layers_per_block == (2,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("try", "PLACE is missing; expected jetflow try DIR"),
        ("try x --count=x", "--count is 'x'; expected a whole number"),
        ("try x --count=10", "--count is 10; expected 1 to 9"),
        ("try x --rate=-1", "--rate is -1.0; expected 0 or more"),
        ("try x --sizes=1,0", "--sizes is 0; expected 1 or more"),
        ("try x --what=c", "--what is 'c'; expected one of a, b"),
    ],
)
def test_options_are_checked(line, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        parse(COMMAND, line.split())


def test_help_has_each_flag_with_its_default():
    lines = help_text(COMMAND).splitlines()
    assert lines[0] == "  jetflow try DIR"
    assert "  --count: a number (default 3)" in lines
    assert "  --sizes: several (default 1,2)" in lines
    assert "  --what: one of two (a, b) (default a)" in lines
    assert "  --quick: a switch" in lines and not [line for line in lines if "place" in line]


@pytest.mark.parametrize("name", ["jet", "tarflow"])
def test_evaluation_repeats_that_of_training(name, trained, tmp_path, digits):
    workdir, metric = tmp_path / "run", "noised_bpd" if name == "tarflow" else "bpd"
    shutil.copytree(trained(name), workdir)
    (path,) = workdir.glob(f"evals/{metric}-{tiny_runs.STEPS:08d}.json")
    expected = json.loads(path.read_text())
    path.unlink()
    flags = ["--metrics", metric, "--draws", "2"]
    assert cli.main(["evaluate", "--workdir", str(workdir), *flags]) == 0
    result = json.loads(path.read_text())
    for key in ("value", "standard_error"):
        assert result.pop(key) == pytest.approx(expected.pop(key), rel=1e-5), key
    assert result["data"] == expected["data"]
    assert result["data"]["checksum"] == digits.checksum()
    assert (result["data"]["split"], result["data"]["examples"]) == ("test", 297)
    assert (result["step"], result["draws"], result["weights"]) == (12, 2, "ema")
    flags = ["--split", "test[:20]", "--draws", "1"]  # which leaves the run its own results
    assert cli.main(["evaluate", "--workdir", str(workdir), *flags]) == 0
    other = workdir / "evals" / f"bpd-{tiny_runs.STEPS:08d}-draws=1,split=test%5B%3A20%5D.json"
    assert json.loads(other.read_text())["data"]["examples"] == 20


def test_evaluation_of_several_metrics(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained("jet"), workdir)
    flags = ["--metrics", "bpd,bpd_gap,accuracy", "--draws", "2", "--batch_size", "50"]
    assert cli.main(["evaluate", "--workdir", str(workdir), *flags]) == 0
    results = {name: json.loads(next(workdir.glob(f"evals/{name}-00000012*.json")).read_text())
               for name in ("bpd", "bpd_gap", "accuracy")}  # fmt: skip
    bpd, gap, accuracy = results.values()
    assert gap["held_out"] == pytest.approx(bpd["value"])
    assert gap["value"] == pytest.approx(gap["held_out"] - gap["train"])
    assert gap["train_data"]["examples"] == gap["data"]["examples"] == 297
    assert gap["train_data"]["checksum"] != gap["data"]["checksum"]
    assert bpd["importance_weighted"] < bpd["value"]
    parts = bpd["parts"]
    total = parts["prior"] + parts["pixels"] + sum(parts["blocks"])
    assert len(parts["blocks"]) == 5 and total == pytest.approx(bpd["value"], rel=1e-5)
    assert 0 < accuracy["value"] < 1 and 0 < accuracy["standard_error"] < 0.05
    lines = capsys.readouterr().out
    assert all(f"step 12: {name} " in lines for name in results)
