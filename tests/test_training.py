"""Training: stopped and resumed to the same bits, extended, and what it writes and prints."""

import math
import re
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2
from tiny_runs import FLOWS, STEPS, assert_same, remains

import jetflow
from jetflow import workdir as workdirs
from jetflow.files import read_metrics
from jetflow.training import loop
from jetflow.training.experiment import Run, count_steps
from jetflow.training.log import SPEED, Reporter
from jetflow.types import UsageError

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(autouse=True)
def handlers():
    """A signal that nobody handles fails the test and does not end pytest; none is left behind."""

    def unhandled(number, _frame):
        raise AssertionError(f"nobody handled signal {number}")

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, unhandled) for number in numbers]
    yield
    after = [signal.signal(number, old) for number, old in zip(numbers, before, strict=True)]
    assert after == [unhandled] * len(numbers), "training left its own handlers"


def first_call(function, action):
    """`function`, with `action` just before its first call."""
    calls = []

    def wrapped(*args, **kwargs):
        if not calls:
            calls.append(args)
            action()
        return function(*args, **kwargs)

    return wrapped


def at_compilation(patch, number):
    patch.setattr(Run, "batches", first_call(Run.batches, lambda: tiny_runs.send(number)))


def after_step(step):
    def plant(patch, number):
        progress = Reporter.progress

        def noticed(self, now, *args, **kwargs):
            if now == step:
                tiny_runs.send(number)
            progress(self, now, *args, **kwargs)

        patch.setattr(Reporter, "progress", noticed)

    return plant


def at_evaluation(patch, number):
    density = loop.bpd.Density
    sending = first_call(density.likelihood, lambda: tiny_runs.send(number))
    patch.setattr(density, "likelihood", sending)


def at_sampling(patch, number):
    patch.setattr(loop, "draw_all", first_call(loop.draw_all, lambda: tiny_runs.send(number)))


# When the signal comes, which one, and the step at which the run has then stopped: the metrics of
# a step are read while the next one runs. Those of step 4 are logged, and not yet read at the stop.
INTERRUPTIONS = [
    (at_compilation, signal.SIGTERM, 0),
    (after_step(3), signal.SIGINT, 4),
    (at_evaluation, signal.SIGTERM, 6),
    (at_sampling, signal.SIGINT, 6),
    (at_evaluation, signal.SIGTERM, 12),
]


@pytest.mark.parametrize("name", FLOWS)
def test_interrupted_runs_end_the_same(name, trained, tmp_path, capsys):
    expected = remains(trained(name))
    assert expected.step == STEPS
    for plant, number, step in INTERRUPTIONS if name == "tarflow" else INTERRUPTIONS[1:2]:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, number)
            assert tiny_runs.train(name, tmp_path) == 128 + number
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"stopped at step {step} of {STEPS}, all saved in {tmp_path}: "
            "run the same command again to go on"
        )
        assert tiny_runs.read_state(tmp_path)[0] == step
    assert tiny_runs.train(name, tmp_path) == 0
    headline = "all 12 steps were done before" if step == STEPS else f"resumed at step {step} of 12"
    assert headline in capsys.readouterr().err
    assert_same(remains(tmp_path), expected)


def test_a_killed_start_leaves_no_stale_metrics(trained, tmp_path, monkeypatch):
    """A run that dies before its first checkpoint starts anew, and writes each line once."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Session, "_save", die)
        with pytest.raises(Killed):
            tiny_runs.train("tarflow", tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert tiny_runs.train("tarflow", tmp_path) == 0
    assert_same(remains(tmp_path), remains(trained("tarflow")))
    assert_events_are_the_metrics(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    """The checkpoints from before stay; none is made of what is broken."""
    fields = {"optim__lr": 1e30, "train__checkpoint_every": 1, "optim__warmup": 0.0}
    assert tiny_runs.train("tarflow", tmp_path, **fields) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert re.match(r"jetflow: step \d+: the (loss or its gradient is|parameters are) not", message)
    assert saved < int(re.search(r"step (\d+)", message)[1])
    assert (
        f"the checkpoint of step {saved} is the last finite in {tmp_path}" in message
        and "optim.lr" in message
    )
    config = tiny_runs.config("tarflow", **fields)
    with pytest.raises(loop.Diverged, match=f"of step {saved} is the last finite"):
        jetflow.train(config, tmp_path)


def test_a_finished_run_is_left_alone(trained, tmp_path, capsys):
    """But what was deleted of it is made again."""
    shutil.copytree(trained("tarflow"), tmp_path, dirs_exist_ok=True)
    files = [*(tmp_path / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    (tmp_path / "samples" / f"step_{STEPS:08d}.png").unlink()
    (tmp_path / "evals" / f"noised_bpd-{STEPS:08d}.json").unlink()
    assert tiny_runs.train("tarflow", tmp_path) == 0
    assert f"done: step {STEPS}, held-out bpd" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in files} == before
    actual, expected = remains(tmp_path), remains(trained("tarflow"))
    assert actual.pictures == expected.pictures
    assert actual.evaluations == expected.evaluations


def test_a_damaged_checkpoint_costs_only_its_steps(trained, tmp_path, caplog):
    shutil.copytree(trained("jet"), tmp_path, dirs_exist_ok=True)
    files = (tmp_path / "checkpoints" / str(STEPS) / "state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with caplog.at_level("WARNING", logger="absl"):
        assert tiny_runs.train("jet", tmp_path) == 0
    assert f"checkpoint {STEPS}" in caplog.text and "damaged" in caplog.text
    assert_same(remains(tmp_path), remains(trained("jet")))


def test_an_ended_run_is_extended(trained, tmp_path, capsys):
    """Only if asked for; with the schedule of the new length, and recorded from which step."""
    shutil.copytree(trained("jet"), tmp_path, dirs_exist_ok=True)
    longer = {"train__steps": STEPS + 6}
    assert tiny_runs.train("jet", tmp_path, **longer) == 2
    message = capsys.readouterr().err
    assert "config.train.steps is 12 there and 18 here" in message and "--extend" in message
    with pytest.raises(UsageError, match="--extend only makes a run longer"):
        jetflow.train(tiny_runs.config("jet", train__steps=6), tmp_path, extend=True)
    arguments = tiny_runs.arguments("jet", tmp_path, **longer)
    assert jetflow.cli.main([*arguments, "--extend"]) == 0
    assert "extended from 12 to 18 steps: from step 12 on" in capsys.readouterr().err
    assert tiny_runs.train("jet", tmp_path, **longer) == 0
    assert "all 18 steps were done before" in capsys.readouterr().err
    lines = read_metrics(tmp_path / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert [*rates] == [1, 4, 8, 12, 16, 18]
    assert rates[16] > rates[12] > 0  # where the first schedule ended, the new one is on its way
    noted = workdirs.scan_environments(tmp_path)[0]
    assert [(one["from_step"], one["total_steps"]) for one in noted] == [(0, 12), (12, 18)]


@pytest.mark.parametrize("name", FLOWS)
def test_metrics(name, trained):
    lines = read_metrics(trained(name) / "metrics.jsonl")
    bpd = "noised_bpd" if name == "tarflow" else "bpd"  # which has gaussian noise
    trains = [line for line in lines if bpd in line]
    tests = [line for line in lines if f"test_{bpd}" in line]
    of_images = [line for line in lines if "test_bpd" in line]
    assert [line["step"] for line in trains] == [1, 4, 8, 12]
    assert [line["step"] for line in tests] == [6, 12]
    assert of_images[-1]["step"] == STEPS  # of any noise, the end has the bpd of the images
    noised = len(of_images) if name == "tarflow" else 0
    assert len(trains) + len(tests) + noised == len(lines)
    assert noised <= 1
    assert all(math.isfinite(value) for line in lines for value in line.values())

    blocks = 5 if name == "jet" else 2
    fields = {"step", bpd, f"{bpd}_prior", f"{bpd}_logdet", "gradient_norm", "learning_rate"}
    fields |= {*SPEED, *(f"output_scale/{block:02d}" for block in range(blocks))}
    fields |= {"jet": {"logdet_cap_share"}, "volume preserving": {"objective"}}.get(name, set())
    for line in trains:
        assert line.keys() == fields
        assert line[bpd] == pytest.approx(line[f"{bpd}_prior"] + line[f"{bpd}_logdet"], rel=1e-6)
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert line["gradient_norm"] > 0
    assert trains[-1][bpd] < trains[0][bpd]
    assert trains[1]["learning_rate"] > trains[-1]["learning_rate"] > 0
    if name == "jet":
        # The identity at first: σ(0) = 1/2, which the factor 2 makes up for.
        assert trains[0]["logdet_cap_share"] == pytest.approx(0, abs=1e-6)
        assert 0 < trains[-1]["logdet_cap_share"] < 1


def events(workdir):
    """All TensorBoard events of a run: records of a length, its checksum, data, its checksum."""
    for path in sorted(workdir.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(workdir):
    """What TensorBoard shows: (name, step, value), where a picture has no value.

    A new session takes the place of what older ones wrote from its first step on.
    """
    points = []
    for event in events(workdir):
        if event.session_log.status == event_pb2.SessionLog.START:
            points = [point for point in points if point[1] < event.step]
        for value in event.summary.value:
            number = None if value.HasField("image") else value.simple_value
            points.append((value.tag, event.step, number))
    return points


def assert_events_are_the_metrics(workdir):
    expected = {
        (name, line["step"]): value
        for line in read_metrics(workdir / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    }
    points = shown(workdir)
    scalars = {(name, step): value for name, step, value in points if value is not None}
    assert scalars == pytest.approx(expected, rel=1e-6)
    pictures = [(name, step) for name, step, value in points if value is None]
    assert pictures == [("samples", 6), ("samples", STEPS)]
    assert len(points) == len(scalars) + len(pictures)


def test_tensorboard_events(trained):
    assert_events_are_the_metrics(trained("jet"))


def test_messages(tmp_path, capsys):
    """Off a terminal: plain lines, each of which is to stay."""
    assert tiny_runs.train("tarflow", tmp_path) == 0
    text = capsys.readouterr().err
    assert "\r" not in text and "1,500 images of 8x8x1, 10 classes" in text
    progress = re.findall(r"^step (\d+)/12 .* images/s .*ETA \d\d:\d\d$", text, re.M)
    assert progress == ["1", "4", "8", "12"]
    assert re.findall(r"^step (\d+): held-out noised_bpd", text, re.M) == ["6", "12"]
    assert re.search("^done: step 12, held-out bpd ", text, re.M)
    for line in text.splitlines()[-4:]:
        place = Path(line.split(maxsplit=1)[1].partition(",")[0])
        assert place.exists() and tmp_path in place.parents


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 1}, 94),  # 1,500 / 16 = 93.75
        ({"images": 160}, 10),
        ({"images": 161}, 11),
        ({}, None),
        ({"steps": 1, "epochs": 1}, None),
        ({"images": -1}, None),
    ],
)
def test_length(length, steps):
    section = ConfigDict({"steps": 0, "epochs": 0, "images": 0, "batch_size": 16} | length)
    if steps:
        assert count_steps(section, 1500) == steps
    else:
        with pytest.raises(UsageError, match="expected exactly one of"):
            count_steps(section, 1500)


def test_images_are_seen_in_the_order_of_the_seed(trained, tmp_path):
    """The seed changes a run, and nothing else does: not how often it looks or saves."""
    looks_less = {"train__eval_every": 0, "train__sample_every": 0, "train__checkpoint_every": 7}
    assert tiny_runs.train("tarflow", tmp_path / "less", **looks_less) == 0
    _, expected = tiny_runs.read_state(trained("tarflow"))
    _, actual = tiny_runs.read_state(tmp_path / "less")
    for path, array in expected.items():
        assert array.tobytes() == actual[path].tobytes(), path


PLAIN_SAMPLES = {"eval__guidance": 0.0, "eval__denoise": False}  # faster to compile


def test_bfloat16(trained, tmp_path):
    assert tiny_runs.train("tarflow", tmp_path, flow__dtype="bfloat16", **PLAIN_SAMPLES) == 0
    tiny_runs.assert_metrics_near(tmp_path, trained("tarflow"), rel=0.02)
    _, state = tiny_runs.read_state(tmp_path)
    _, exact = tiny_runs.read_state(trained("tarflow"))
    for path, array in state.items():
        assert array.dtype == exact[path].dtype and np.isfinite(array.astype(float)).all(), path
    assert any((array != exact[path]).any() for path, array in state.items())


def test_four_devices(trained, tmp_path):
    arguments = tiny_runs.arguments("tarflow", tmp_path, mesh__fsdp=2, **PLAIN_SAMPLES)
    process = tiny_runs.start(arguments, JAX_NUM_CPU_DEVICES="4")
    _, printed = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert "on 4 x cpu (data 2 and fsdp 2); the state takes" in printed
    tiny_runs.assert_metrics_near(tmp_path, trained("tarflow"), rel=1e-5)
