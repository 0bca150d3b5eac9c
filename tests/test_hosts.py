"""Several processes: two of four CPU devices each, joined over the loopback."""

import errno
import fcntl
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
import small_network
import tiny_runs

from jetflow import hosts
from jetflow.training.log import SPEED, read_metrics

DEVICES = 8
# Plain samples, for they compile faster.
FIELDS = {
    "mesh__fsdp": 2,
    "mesh__data": -1,
    "flow__width": 128,
    "eval__guidance": 0.0,
    "eval__denoise": False,
}


@pytest.fixture(scope="module")
def start(data_dir, compilation_cache):
    """A function: starts a command line on several processes, which share eight devices."""
    started = []

    def run(arguments, processes=2, **options) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        variables = {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
        if processes > 1:
            variables |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
            variables |= {"JAX_NUM_PROCESSES": str(processes)}
        options |= variables
        group = [
            tiny_runs.start([str(a) for a in arguments], JAX_PROCESS_ID=str(number), **options)
            for number in range(processes)
        ]
        started.extend(group)
        return group

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(group, status=0, timeout=600) -> list[tuple[str, str]]:
    """The output and errors of the processes when all have ended, without what Gloo prints."""
    ends = [process.communicate(timeout=timeout) for process in group]
    ends = [(re.sub(r"\[Gloo\].*\n", "", output), errors) for output, errors in ends]
    assert [process.returncode for process in group] == [status] * len(group), ends
    return ends


def train(name, workdir, **fields):
    return tiny_runs.arguments(name, workdir, **FIELDS, **fields)


def same_metrics(workdir, expected):
    actual = read_metrics(workdir / "metrics.jsonl")
    for several, one in zip(actual, read_metrics(expected / "metrics.jsonl"), strict=True):
        assert several.keys() == one.keys()
        for metric in set(one) - set(SPEED):
            assert several[metric] == pytest.approx(one[metric], rel=1e-6, abs=1e-7), metric


def wait_for_checkpoint(group, workdir, step):
    while not (workdir / "checkpoints" / str(step)).exists():
        assert all(process.poll() is None for process in group), finish(group)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The same run by one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(train("tarflow", workdir), processes=1))
    return workdir


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROC"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two' in the environment; expected a"),
    ],
)
def test_a_process_that_cannot_know_the_others_is_refused(environment, message):
    environment = {"JAX_COORDINATOR_ADDRESS": "localhost:1", **environment}
    process = tiny_runs.start(["sample", "--workdir", "nothing"], **environment)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert message in errors and "Traceback" not in errors


def test_a_process_says_that_it_waits(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setattr(hosts, "NOTICE_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    with hosts.joined(saves_at_signals=True):
        pass
    assert "still waiting for the other processes" in capsys.readouterr().err


def test_a_lock_keeps_others_out(tmp_path):
    lock = functools.partial(hosts.locked, tmp_path / "lock")
    with lock(wait=False) as mine, lock(wait=False) as another:
        assert mine and not another
    with lock(wait=True) as mine:
        assert mine


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("one", "other"):
        with hosts.locked(tmp_path / name, wait=True) as mine:
            assert mine
    assert caplog.text.count(f"{tmp_path} cannot be locked ([Errno 37] No locks") == 1


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_status_2(start, tmp_path):
    group = start(train("tarflow", tmp_path / "run", train__batch_size=15))
    for _, errors in finish(group, status=2):
        assert "config.train.batch_size 15 is not divisible" in errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_processes_train_stop_and_go_on_as_one(start, alone, tmp_path):
    """A signal to one stops all; one goes on alone, and is killed; the end is that of one."""
    workdir = tmp_path / "run"
    group = start(train("tarflow", workdir))
    wait_for_checkpoint(group, workdir, 5)
    group[1].send_signal(signal.SIGTERM)
    (_, first), (_, second) = finish(group, status=128 + signal.SIGTERM)
    assert "on 8 x cpu (data 4 and fsdp 2)" in first and "all saved in" in first
    assert "step" not in second
    group = start(train("tarflow", workdir), processes=1)
    wait_for_checkpoint(group, workdir, 10)
    for process in group:
        process.kill()
        process.communicate()
    ((_, first), _) = finish(start(train("tarflow", workdir)))
    assert "resumed at step 10" in first and "done: step 12" in first
    same_metrics(workdir, alone)


@pytest.mark.slow
def test_processes_sample_and_evaluate_as_one(start, alone, tmp_path):
    results = {}
    for processes in (1, 2):
        workdir = shutil.copytree(alone, tmp_path / str(processes))
        shutil.rmtree(workdir / "evals")
        ends = finish(start(["evaluate", "--workdir", workdir, "--draws", 1], processes))
        npz, out = tmp_path / f"{processes}.npz", tmp_path / "grid.png"
        flags = ["--workdir", workdir, "--mesh", "fsdp=2,data=4", "--out", out]
        ends += finish(start(["sample", *flags, "--num", 20, "--npz", npz], processes))
        assert [bool(output) for output, _ in ends] == [True, False][:processes] * 2
        bpd = json.loads(next(workdir.glob("evals/bpd*")).read_text())["value"]
        with np.load(npz) as arrays:
            results[processes] = bpd, arrays["images"].astype(int)
    assert results[2][0] == pytest.approx(results[1][0], rel=1e-6)
    assert np.abs(results[1][1] - results[2][1]).max() <= 1


@pytest.mark.slow
def test_processes_find_the_same_distances_as_one(start, alone, tmp_path):
    """Each reads its part of the data and of the samples; their statistics become one."""
    values = {}
    for processes in (1, 2):
        workdir = shutil.copytree(alone, tmp_path / str(processes))
        arguments = ["evaluate", "--workdir", workdir, "--batch_size", 16]
        arguments += ["--reference", tmp_path / f"reference{processes}.npz"]
        for flags in (
            ["--reference_split", "train[:45]", "--make_reference"],
            ["--num_samples", 30, "--metrics", "fid,sfid,kid,precision_recall,density_coverage"],
        ):
            finish(start([*arguments, *flags], processes, program=[small_network.__file__]))
        results = [json.loads(path.read_text()) for path in workdir.glob("evals/*num_samples*")]
        values[processes] = {result["metric"]: result["value"] for result in results}
    assert len(values[1]) == 7 and values[1]["fid"] > 0
    assert values[2] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
def test_when_one_process_dies_the_others_end(start, tmp_path):
    group = start(train("tarflow", tmp_path / "run", train__steps=10**6))
    wait_for_checkpoint(group, tmp_path / "run", 5)
    group[1].kill()
    _, errors = group[0].communicate(timeout=600)
    assert group[0].returncode not in (0, 2)
    assert re.search("it or another one failed|another task died|unhealthy|heartbeat", errors)
