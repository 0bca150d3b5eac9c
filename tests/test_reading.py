"""Batches on their way: by which processes they are read, when, and who waits for them."""

import itertools
import os
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
from jetflow.training.log import read_metrics

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
        [sys.executable, "-m", "jetflow", *arguments],
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


def test_ahead_keeps_the_order_stays_near_and_passes_errors_on():
    made = []

    def change(number):
        made.append(number)
        if number == 7:
            raise OSError("the disk is gone")
        return -number

    ahead = Ahead(numbers(), change, depth=2)
    assert [next(ahead) for _ in range(5)] == [0, -1, -2, -3, -4]
    assert made == list(range(len(made))) and len(made) <= 7
    with pytest.raises(OSError, match="the disk is gone"):
        list(zip(range(3), ahead, strict=False))
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
    """High where batches take longer than steps, and said."""
    read = pipeline._read

    def slowly(dataset, rows, positions):
        time.sleep(0.2)
        return read(dataset, rows, positions)

    monkeypatch.setattr(pipeline, "_read", slowly)
    fields = {"steps": 16, "log_every": 8, "eval_every": 0, "sample_every": 0}
    fields |= {"checkpoint_every": 100}  # while it saves, what waits is read ahead
    fields = {f"train__{name}": value for name, value in fields.items()}
    assert tiny_runs.train("jet", tmp_path, **fields) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    [share] = [
        each["data_wait_share"]
        for each in lines
        if each["step"] == 16 and "data_wait_share" in each
    ]
    assert share > 0.3
    assert "for data" in capsys.readouterr().err
