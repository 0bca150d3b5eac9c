"""Batches on their way: by which processes they are read, when, and who waits for them."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import tiny_runs
from tiny_runs import assert_same, remains

from jetflow.data import dataset as pipeline
from jetflow.data.reading import Ahead
from jetflow.training.log import Reporter, read_metrics

TIMEOUT = 300  # seconds


# Worker processes.


def test_workers_read_the_same_batches():
    """From the middle on, some rows; images go through shared memory, labels do not."""
    dataset = pipeline.load("photos/16", "train[:500]")
    rows = np.delete(np.arange(96), [3, 40, 41])
    options = {"batch_size": 96, "seed": 7, "start_step": 4, "rows": rows}
    expected = list(itertools.islice(pipeline.train_batches(dataset, **options), 8))
    before = spawned()
    batches = pipeline.train_batches(dataset, **options, workers=2)
    for number, theirs in enumerate(itertools.islice(batches, 8)):
        for x, y in zip(expected[number], theirs, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert number == 7 and spawned() == before + 2
    batches.close()
    assert spawned() == before


def spawned() -> int:
    """Worker processes of this one."""
    children = psutil.Process().children()
    return sum("spawn_main" in " ".join(child.cmdline()) for child in children)


def start(workdir, **fields):
    """A training in a process group of its own, as a shell starts it."""
    arguments = tiny_runs.arguments("tarflow", workdir, data__workers=2, **fields)
    return subprocess.Popen(
        [sys.executable, "-m", "jetflow.cli", *arguments],
        env=tiny_runs.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(workdir):
    return bool(read_metrics(workdir / "metrics.jsonl"))


@pytest.mark.slow
def test_workers_change_nothing_and_leave_signals_to_the_trainer(trained, tmp_path):
    """Ctrl-C goes to all processes of the terminal; the run goes on to the same end without any."""
    process = start(tmp_path)
    wait_until(lambda: logged(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT)
    if process.returncode:  # else it was done before
        assert process.returncode == 128 + signal.SIGINT, said
        assert "all saved in" in said
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
    assert tiny_runs.train("tarflow", tmp_path, data__workers=0) == 0
    assert_same(remains(tmp_path), remains(trained("tarflow")))


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(tmp_path, compilation_cache):
    process = start(tmp_path, train__steps=100_000)
    wait_until(lambda: logged(tmp_path), process)
    children = psutil.Process(process.pid).children()
    assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2
    process.kill()
    process.communicate(timeout=TIMEOUT)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


# On the devices, ahead of the step.


def numbers(gate=None):
    for number in itertools.count():
        if gate is not None:
            gate.acquire()
        yield number


def test_ahead_keeps_the_order_and_stays_near():
    made = []
    ahead = Ahead(numbers(), lambda number: made.append(number) or -number, depth=2)
    assert [next(ahead) for _ in range(5)] == [0, -1, -2, -3, -4]
    ahead.close()
    assert made == list(range(len(made))) and len(made) <= 7


def test_ahead_passes_errors_on():
    def source():
        yield 1
        raise OSError("the disk is gone")

    ahead = Ahead(source(), lambda number: number)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    ahead.close()


def test_waiting_is_what_comes_after_the_step():
    """What is there costs nothing; what is not is waited for, from the end of the step on."""
    gate = threading.Semaphore(2)
    ahead = Ahead(numbers(gate), lambda number: number, depth=2)
    running = jnp.zeros(())
    while not all(future.done() for future in ahead._coming):
        time.sleep(0.01)
    assert ahead.after(running) == (0, 0.0)
    assert ahead.after(running) == (1, 0.0)
    threading.Timer(0.3, gate.release).start()
    start = time.perf_counter()
    number, waited = ahead.after(running)
    assert number == 2
    assert 0.2 < waited <= time.perf_counter() - start
    for _ in range(4):
        gate.release()
    ahead.close()


@pytest.mark.usefixtures("compilation_cache")
def test_share_of_waiting_in_training(tmp_path, monkeypatch, capsys):
    """High where batches take longer than steps, and said; low where they do not."""
    read, progress = pipeline._read, Reporter.progress

    def slowly(dataset, rows, positions):
        time.sleep(0.2)
        return read(dataset, rows, positions)

    def slow_progress(self, *args, **kwargs):
        time.sleep(0.1)
        progress(self, *args, **kwargs)

    def shares(workdir):
        fields = {"steps": 40, "log_every": 20, "eval_every": 0, "sample_every": 0}
        fields |= {"checkpoint_every": 100}  # while it saves, what waits is read ahead
        fields = {f"train__{name}": value for name, value in fields.items()}
        assert tiny_runs.train("jet", workdir, **fields) == 0
        lines = read_metrics(workdir / "metrics.jsonl")
        return {
            line["step"]: line["data_wait_share"] for line in lines if "data_wait_share" in line
        }

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_read", slowly)
        assert shares(tmp_path / "slow")[40] > 0.3
    assert "for data" in capsys.readouterr().err
    monkeypatch.setattr(Reporter, "progress", slow_progress)
    assert shares(tmp_path / "fast")[40] < 0.1


def test_workers_are_no_part_of_a_run(trained, tmp_path, capsys):
    """A finished run may be looked at again with another number of them."""
    shutil.copytree(trained("jet"), tmp_path, dirs_exist_ok=True)
    assert tiny_runs.train("jet", tmp_path, data__workers=1) == 0
    assert "were done before" in capsys.readouterr().err
    assert tiny_runs.train("jet", tmp_path, data__workers=-1) == 2
    assert "config.data.workers is -1; expected 0 or more" in capsys.readouterr().err
