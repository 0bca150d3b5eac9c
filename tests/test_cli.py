"""The command line: options and their flags, help, and what `jetflow evaluate` leaves."""

import dataclasses
import json
import os
import pwd
import shutil
import signal
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

CONFIG = str(tiny_runs.ROOT / "configs" / "digits_tarflow.py")


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
    messages = [
        "18 / accumulation 2 is not divisible by the 4 devices",
        "16 / accumulation 8 is not divisible by the 4 devices",
        "config.eval.batch_size 30 is not divisible by the 4 devices",
        "config.mesh has data=-1, fsdp=3, tensor=1, but there are 4 devices",
    ]
    for line, message in zip(process.stderr.splitlines(), messages, strict=True):
        assert message in line
    assert not (tmp_path / "run").exists()


def test_without_a_home_no_folder_of_its_name_appears(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    for line in (["prepare", "digits"], ["prepare", "cifar10", "--manual_dir=~/archives"]):
        assert cli.main(line) == 2
        assert "is known; give a path without ~" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    for arguments, status in (["--help"], 0), ([], 2):
        assert cli.main(arguments) == status
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in cli.SUMMARIES)
    for name, summary in cli.SUMMARIES.items():
        assert cli.main([name, "--help"]) == 0
        printed = capsys.readouterr()
        assert printed.err == "" and printed.out.startswith(summary) and "\n  --" in printed.out


@pytest.mark.parametrize(
    ("name", "kinds", "required"),
    [("bench", ("sample", "train", "data"), {"--config"}),
     ("convert", ("--reverse tarflow", "tarflow", "jet"), {"SOURCE", "--out", "--noise_std"})],
)  # fmt: skip
def test_help_of_commands_of_several_kinds(name, kinds, required, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  jetflow {name} {kind} " in text for kind in kinds)
    marked = {line.split(":")[0].strip() for line in text.splitlines() if "(required)" in line}
    assert required <= marked and "--data" not in marked


def test_a_process_has_the_same_status_and_line():
    process = tiny_runs.start(["sample", "--workdir", "nothing", "--num=x"])
    line = "jetflow: --num is 'x'; expected a whole number\n"
    assert process.communicate(timeout=900) == ("", line)
    assert process.returncode == 2


# Interrupted, while what runs at Python's own end would crash.
INTERRUPTED = """
import atexit, os, sys
from jetflow import cli
def interrupt(_):
    raise KeyboardInterrupt
cli._run, sys.argv = interrupt, ["jetflow", *sys.argv[1:]]
atexit.register(os.abort)
print("said")
cli.main()
"""


@pytest.mark.parametrize(
    ("words", "more"),
    [(["sample", "--npz=a.npz"], "; the same command goes on"), (["report", "a"], "")],
)
def test_an_interruption_ends_at_once(words, more):
    process = tiny_runs.start(words, ["-c", INTERRUPTED])
    assert process.communicate(timeout=900) == ("said\n", f"jetflow: interrupted{more}\n")
    assert process.returncode == 130


def test_a_reader_that_has_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "jetflow", "convert", "--help"],
        env=tiny_runs.environment(), stdout=writer, stderr=subprocess.PIPE, timeout=900,
    )  # fmt: skip
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, b"")


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


def test_the_last_change_of_a_field_counts():
    changes = ["--config.train.steps", "7", "--config.data.labels=false", "--config.noise.flip"]
    changes += ["--config.flow.layers_per_block=(1,)", "--config.train.steps=8"]
    changes += ["--config.flow.layers_per_block=2", "--config.flow.layers_per_block=(2,3)"]
    config = parse(COMMAND, ["try", *changes, "x", "--config", CONFIG]).config
    assert (config.train.steps, config.data.labels, config.noise.flip) == (8, False, True)
    assert config.flow.layers_per_block == (2, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("try", "PLACE is missing; expected jetflow try DIR"),
        ("try x --count=x", "--count is 'x'; expected a whole number"),
        ("try x --count=10", "--count is 10; expected 1 to 9"),
        ("try x --rate=-1", "--rate is -1.0; expected 0 or more"),
        ("try x --rate=nan", "--rate is nan; expected a finite number"),
        ("try x --sizes=1,0", "--sizes is 0; expected 1 or more"),
        ("try x --sizes=1,9999999999", "--sizes is 9999999999; expected 1 to 2147483647"),
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
    assert "  --quick: a switch" in lines and "  PLACE: given by its place (required)" in lines


@pytest.mark.parametrize("name", ["jet", "tarflow"])
def test_evaluation_repeats_that_of_training(name, trained, tmp_path):
    digits, workdir = pipeline.load("digits", "test"), tmp_path / "run"
    metric = "noised_bpd" if name == "tarflow" else "bpd"
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
