"""What a run leaves to look at, and what it says on a terminal and elsewhere."""

import io
import json
import sys
import time

import pytest

from jetflow.files import read_metrics
from jetflow.training import log as report
from jetflow.training.log import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after this: a carriage return goes back to overwrite."""
    lines = []
    for text in written.split("\n"):
        line = ""
        for part in text.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def progress(reporter, step, *, log=False, value="bpd 3.500"):
    reporter.progress(step, value, 16, log=log)


def test_a_terminal_has_one_line_of_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Reporter(tmp_path, start_step=0, total_steps=1000) as reporter:
        for step in (998, 999):
            progress(reporter, step, value="bpd 12345.500")
        progress(reporter, 1, value="bpd 3.5")  # shorter than the line before
        assert len(screen(terminal.getvalue())) == 1
        (line,) = screen(terminal.getvalue())
        assert line.startswith("step 1/1000 (0%)  bpd 3.5  ") and line.count("ETA") == 1
        reporter.say("held-out bpd 3.25")
        progress(reporter, 1000, log=True)
        held_out, line = screen(terminal.getvalue())
        assert held_out == "held-out bpd 3.25"
        assert line.startswith("step 1000/1000 (100%)  bpd 3.500  ")
        assert line.endswith("ETA 0:00")
    assert screen(terminal.getvalue()) == ["held-out bpd 3.25", ""]


def test_elsewhere_lines_are_plain_and_few(tmp_path, capsys):
    with Reporter(tmp_path, start_step=0, total_steps=10) as reporter:
        for step in range(1, 11):
            progress(reporter, step, log=step % 5 == 0)
    written = capsys.readouterr().err
    assert "\r" not in written
    starts = [line.partition(" (")[0] for line in written.splitlines()]
    assert starts == ["step 5/10", "step 10/10"]


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass for the reporter."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_speed_is_that_of_training(tmp_path, clock, capsys):
    """Evaluations do not count; the line shows the average, the metrics the last stretch."""
    with Reporter(tmp_path, start_step=100, total_steps=1000) as reporter:
        clock(10)
        reporter.waited(0.2)
        reporter.waited(0.3)
        assert reporter.speed(120, 16) == {
            "images_per_second": pytest.approx(20 * 16 / 10),
            "data_wait_share": pytest.approx(0.05),
        }
        with reporter.pause():
            clock(1000)
        clock(10)
        progress(reporter, 160, log=True)
        assert reporter.speed(160, 16) == {
            "images_per_second": pytest.approx(40 * 16 / 10),
            "data_wait_share": 0,
        }
        progress(reporter, 160, log=True)
    # 60 steps in 20 seconds, and 840 to go.
    waited, not_any_more = capsys.readouterr().err.splitlines()
    assert waited.endswith("  48 images/s  waiting 5% for data  ETA 4:40")
    assert not_any_more.endswith("  48 images/s  ETA 4:40")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (90061.0, "25:01:01")]
)
def test_durations(seconds, text):
    assert report._duration(seconds) == text


def write(workdir, start_step, steps):
    with Reporter(workdir, start_step=start_step, total_steps=9) as reporter:
        for step in steps:
            reporter.write(step, {"bpd": step / 2})


def test_metrics_of_later_steps_are_dropped_on_resume(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "bp')  # cut short by a kill
    with Reporter(tmp_path, start_step=2, total_steps=9) as reporter:
        assert reporter.has(2, "bpd") and not reporter.has(2, "test_bpd")
        assert not reporter.has(3, "bpd") and not reporter.has(5, "bpd")
        reporter.write(3, {"bpd": 7.0, "test_bpd": 8.0})
        assert reporter.has(3, "bpd") and reporter.has(3, "test_bpd")
        # On disk at once, for a kill may come.
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines == [
        {"step": 1, "bpd": 0.5},
        {"step": 2, "bpd": 1.0},
        {"step": 3, "bpd": 7.0, "test_bpd": 8.0},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
