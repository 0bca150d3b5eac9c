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
from tiny_runs import assert_same, remains, wait_for

from jetflow import cli
from jetflow.data import dataset as pipeline
from jetflow.data import reading
from jetflow.data.reading import Ahead
from jetflow.files import read_metrics
from jetflow.tools import throughput

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


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_is_one_line(number, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(reading, "STOPPED_SECONDS", 0.6)
    monkeypatch.setattr(throughput, "ROUND_SECONDS", 600)
    tfds_name = f"--data_dir={data_dir}"

    def lose():
        wait_for(lambda: spawned(), "the workers")
        time.sleep(3 * (number == signal.SIGSTOP))  # while it starts, or while it reads
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(number)

    thread = threading.Thread(target=lose)
    thread.start()
    config = tiny_runs.arguments("jet", "")[1:-2]
    assert cli.main(["bench", "data", *config, "--workers=2", tfds_name]) == 1
    thread.join()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jetflow: ")]
    assert len(lines) == 1 and "data.workers" in lines[0] and "run the same command" in lines[0]
    wait_for(lambda: not spawned(), "the end of the workers")


@pytest.mark.slow
def test_workers_change_nothing_and_leave_signals_to_the_trainer(
    trained, tmp_path, compilation_cache
):
    """Ctrl-C goes to all processes of the terminal; the run goes on to the same end without any.

    Of a trainer that is killed, the workers end as well.
    """
    arguments = tiny_runs.arguments("tarflow", tmp_path, data__workers=2)
    program = [sys.executable, "-m", "jetflow", *arguments]
    options = {"env": tiny_runs.environment(), "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, start_new_session=True, **options)
    wait_for(lambda: read_metrics(tmp_path / "metrics.jsonl") or process.poll(), "a logged step")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    if process.returncode:  # else it was done before
        assert process.returncode == 128 + signal.SIGINT, said
        assert "all saved in" in said
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
    assert tiny_runs.train("tarflow", tmp_path, data__workers=0) == 0
    assert_same(remains(tmp_path), remains(trained("tarflow")))

    process = subprocess.Popen([*program, "--config.train.steps=100000", "--extend"], **options)
    wait_for(lambda: len(psutil.Process(process.pid).children()) >= 3, "the workers")
    children = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=60)[1]


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
