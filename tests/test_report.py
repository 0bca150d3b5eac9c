"""Metrics and progress of a training: on disk, on a terminal and elsewhere."""

import io
import json
import sys
import time

import pytest

from jetflow.files import read_metrics
from jetflow.training.log import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_has_a_bar_and_lines_that_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Reporter(tmp_path, start_step=0, total_steps=10) as reporter:
        reporter.progress(5, "bpd 3.500")
        reporter.log(5, {"bpd": 3.5}, "bpd 3.500", 16)
        reporter.say("held-out bpd 3.25")
    written = terminal.getvalue()
    assert "training" in written and "held-out bpd 3.25\n" in written
    assert written.count("\n") == 1, "the bar goes, the line stays"


def test_elsewhere_lines_are_plain_and_few(tmp_path, capsys):
    with Reporter(tmp_path, start_step=0, total_steps=10) as reporter:
        for step in range(1, 11):
            reporter.progress(step, "bpd 3.500")
            if step % 5 == 0:
                reporter.log(step, {"bpd": 3.5}, "bpd 3.500", 16)
    written = capsys.readouterr().err
    assert "\r" not in written
    assert [line.partition(" (")[0] for line in written.splitlines()] == ["step 5/10", "step 10/10"]


def test_speed_is_that_of_training(tmp_path, monkeypatch, capsys):
    """Evaluations do not count."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with Reporter(tmp_path, start_step=100, total_steps=1000) as reporter:
        clock[0] += 10
        reporter.waited += 0.5
        reporter.log(120, {"bpd": 3.5}, "bpd", 16)
        with reporter.pause():
            clock[0] += 1000
        clock[0] += 10
        reporter.log(160, {"bpd": 3.5}, "bpd", 16)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["images_per_second"] == pytest.approx(20 * 16 / 10)
    assert first["data_wait_share"] == pytest.approx(0.05)
    assert second["images_per_second"] == pytest.approx(40 * 16 / 10)
    assert second["data_wait_share"] == 0
    waited, not_any_more = capsys.readouterr().err.splitlines()
    assert waited.endswith("  32 images/s  waiting 5% for data  ETA 07:20")
    assert not_any_more.endswith("  64 images/s  ETA 03:30")


def test_metrics_of_later_steps_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with Reporter(tmp_path, start_step=0, total_steps=9) as reporter:
        for step in (1, 2, 3, 4):
            reporter.write(step, {"bpd": step / 2})
    with path.open("a") as file:
        file.write('{"step": 5, "bp')  # cut short by a kill
    with Reporter(tmp_path, start_step=2, total_steps=9) as reporter:
        assert reporter.has(2, "bpd") and not reporter.has(2, "test_bpd")
        assert not reporter.has(3, "bpd") and not reporter.has(5, "bpd")
        reporter.write(3, {"bpd": 7.0, "test_bpd": 8.0})
        lines = [json.loads(line) for line in path.open()]  # at once, for a kill may come
    assert lines == [{"step": 1, "bpd": 0.5}, {"step": 2, "bpd": 1.0},
                     {"step": 3, "bpd": 7.0, "test_bpd": 8.0}]  # fmt: skip
