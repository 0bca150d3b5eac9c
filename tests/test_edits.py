"""Files beside a checkpoint that were edited: refused in one line, or set aside and made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import html_page
import jax
import pytest
import tiny_runs

import jetflow
from jetflow import cli
from jetflow.files import read_metrics, scan_json, scan_metrics
from jetflow.tools.report.run_page import run_page
from jetflow.types import UsageError
from jetflow.workdir import EVALUATION, read_config, read_flow, scan_environments

DEEP = b"[" * 100_000
GARBAGE = {
    "empty": b"", "cut": b'{"step": 1, "flow"', "null": b"null", "a number": b"7", "a text": b'"x"',
    "not UTF-8": b'{"step": "\xff"}', "UTF-16": '{"step": 1}'.encode("utf-16")[:-1], "deep": DEEP,
    "zeros": bytes(99), "half a character": b'{"step": 1, "metric": "\\ud800"}',
}  # fmt: skip


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained("tarflow"), tmp_path / "run")


def edited(path: Path, field: str, value: object) -> None:
    """Set a field such as "flow.width", or delete it if the value is `...`."""
    content = json.loads(path.read_text())
    *parents, last = field.split(".")
    node = content
    for name in parents:
        node = node[int(name) if isinstance(node, list) else name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    path.write_text(json.dumps(content))


def refused(arguments: list[str], capsys) -> str:
    """The only line of a command that ends with status 2."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("jetflow: ") and line.count("\n") == 1 and len(line) < 1000
    return line


# The sealed config decides


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flow.pixel_scale", 64.0), ("flow.width", "32"), ("flow.kind", "jet"), ("flow.kind", ...),
        ("flow.more", 1), ("flow", []), ("flow", ...), ("noise.std", 0.2), ("noise", None),
        ("train.ema_decay", 0.0), ("train.ema_decay", "0.9"), ("train.seed", 1), ("data.name", 3),
        ("eval.draws", 1.5), ("optim.lr", 1), ("resolved.num_classes", 9), ("resolved", ...),
        ("resolved.image_shape", [16, 16, 1]), ("resolved.image_shape", "8x8"), ("format", "1"),
        ("format", 99),
    ],
)  # fmt: skip
def test_an_edited_config_is_refused_by_its_field(run, field, value):
    edited(run / "config.json", field, value)
    with pytest.raises(UsageError) as error:
        read_flow(run)
    line = str(error.value)
    assert "config.json" in line and field in line and "\n" not in line and len(line) < 1000


@pytest.mark.parametrize("kind", [*GARBAGE])
def test_a_config_that_is_none_is_refused(run, kind):
    before = read_config(run)
    (run / "config.json").write_bytes(GARBAGE[kind])
    with pytest.raises(UsageError, match=r"config.json cannot be read .*delete it") as error:
        read_config(run)
    assert "\n" not in str(error.value)
    (run / "config.json").unlink()  # as the line advises
    assert read_config(run) == before


def test_every_command_refuses_it(run, tmp_path, capsys):
    edited(run / "config.json", "flow.pixel_scale", 64.0)
    (tmp_path / "sweep.py").write_text(
        "from jetflow.sweeps import Sweep, axis\n"
        "def get_sweep():\n    return Sweep(axis('draws', [1]), metrics=('bpd',))\n"
    )
    other, workdir = str(tmp_path / "other"), ["--workdir", str(run)]
    for arguments in (
        tiny_runs.arguments("tarflow", run),
        tiny_runs.arguments("tarflow", tmp_path / "new", init_from=run),
        ["evaluate", *workdir],
        ["sample", *workdir, "--out", f"{other}.png"],
        ["sweep", "--sweep", str(tmp_path / "sweep.py"), "--run", str(run), "--workdir", other],
    ):
        assert "flow.pixel_scale is 127.5 there and 64.0 here" in refused(arguments, capsys)


def test_what_a_run_does_not_keep_may_be_edited_and_a_lost_config_comes_back(run):
    edited(run / "config.json", "mesh", 5)
    edited(run / "config.json", "train.log_every", "often")
    assert tiny_runs.train("tarflow", run) == 0
    written = json.loads((run / "config.json").read_text())
    (run / "config.json").unlink()
    assert tiny_runs.train("tarflow", run, train__seed=1) == 2
    assert tiny_runs.train("tarflow", run) == 0
    assert json.loads((run / "config.json").read_text()) == written


@pytest.mark.parametrize(
    ("field", "value"), [("flow.width", "32"), ("train.ema_decay", True), ("data", ...)]
)
def test_without_a_checkpoint_the_shape_is_checked(run, field, value, capsys):
    shutil.rmtree(run / "checkpoints")
    edited(run / "config.json", field, value)
    refused(["report", str(run)], capsys)


# What a run can do without

BPD, METRICS, ENVIRONMENT = "evals/bpd-00000012.json", "metrics.jsonl", "environment.json"
LINES = {
    **GARBAGE,
    "no step": b'{"bpd": 1.0}',
    "a step that is a text": b'{"step": "3", "bpd": 1.0}',
    "a metric that is a text": b'{"step": 3, "bpd": "low"}',
    "a metric beyond numbers": b'{"step": 3, "bpd": 1e999}',
    "a step beyond numbers": b'{"step": %s, "bpd": 1}' % (b"9" * 400),
}


def insert(path: Path, line: bytes) -> None:
    """A line among those of a file."""
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(b"\n".join([first, line, rest]))


EDITS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"a line: {kind}": (METRICS, lambda path, text=text: insert(path, text))
       for kind, text in LINES.items()},
    **{f"{name}: {kind}": (name, lambda path, text=text: path.write_bytes(text))
       for name in (BPD, ENVIRONMENT) for kind, text in GARBAGE.items()},
    "no value": (BPD, lambda path: edited(path, "value", ...)),
    "a value that is a text": (BPD, lambda path: edited(path, "value", "low")),
    "data that is a text": (BPD, lambda path: edited(path, "data", "digits")),
    "an environment without step": (ENVIRONMENT, lambda path: edited(path, "0.from_step", ...)),
}  # fmt: skip


@pytest.mark.parametrize("edit", [*EDITS])
def test_the_rest_of_a_file_and_of_its_fellows_is_read(run, edit):
    name, apply = EDITS[edit]
    scans = {
        METRICS: lambda: scan_metrics(run / METRICS),
        BPD: lambda: scan_json(sorted(run.glob("evals/*.json")), EVALUATION),
        ENVIRONMENT: lambda: scan_environments(run),
    }
    before, none = scans[name]()
    place = sorted(run.glob("evals/*.json")).index(run / BPD) if name == BPD else 0
    apply(run / name)
    after, [wrong] = scans[name]()
    assert none == [] and name in wrong and "\n" not in wrong and len(wrong) < 500
    assert after == (before if name == METRICS else before[:place] + before[place + 1 :])


def test_the_page_says_what_it_leaves_out(run):
    before = run_page(run)
    insert(run / METRICS, b"<b>")
    (run / ENVIRONMENT).write_bytes(DEEP)
    edited(run / BPD, "value", "<b>")
    (run / "samples" / "step_last.png").touch()
    page = run_page(run)
    assert page["data"] == before["data"] and page["environments"] is None
    assert len(page["evaluations"]) == len(before["evaluations"]) - 1
    content = str(jetflow.report(run, "md"))
    for name in (METRICS, BPD, ENVIRONMENT):
        assert f"{name} cannot be read" in content.replace("\\_", "_")
    assert "<b>" not in html_page.read(jetflow.report(run).read_text()).tags


@pytest.mark.parametrize("kind", ["cut", "not UTF-8"])
def test_a_restart_sets_damage_aside_and_goes_on(run, kind, caplog):
    evaluation, metrics = (run / BPD).read_bytes(), read_metrics(run / METRICS)
    insert(run / METRICS, GARBAGE[kind])
    for name in (BPD, ENVIRONMENT):
        (run / name).write_bytes(GARBAGE[kind])
    assert tiny_runs.train("tarflow", run) == 0
    assert len(caplog.messages) == 3 and all("set aside" in text for text in caplog.messages)
    assert len([*run.rglob("*.damaged")]) == 3
    assert read_metrics(run / METRICS) == metrics and (run / BPD).read_bytes() == evaluation
    assert json.loads((run / ENVIRONMENT).read_text())[0]["jax"] == jax.__version__
    assert not run_page(run)["damaged"]
