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
from PIL import Image

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
DISTANCES = "fid,sfid,kid,precision_recall,density_coverage"


@pytest.fixture(scope="module")
def start(data_dir, compilation_cache):
    """A function: starts a command line on several processes, which share eight devices."""
    started = []

    def run(arguments, processes=2, **options) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        variables = {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes)} | tiny_runs.UNOPTIMISED
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


def finish(group, status=0, timeout=300) -> list[tuple[str, str]]:
    """What the processes said, out and err, when all have ended; without what Gloo prints."""
    said = [process.communicate(timeout=timeout) for process in group]
    said = [(re.sub(r"\[Gloo\].*\n", "", out), err) for out, err in said]
    assert [process.returncode for process in group] == [status] * len(group), said
    return said


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
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROC"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is 'two' in the environment; expected a whole number",
        ),
    ],
)
def test_a_half_told_process_is_refused(environment, message):
    process = tiny_runs.start(["sample", "--workdir", "nothing"], **environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in said and "Traceback" not in said


@pytest.mark.slow
def test_a_signal_ends_sampling_at_once(start, alone, tmp_path):
    """It has no need to save: what is drawn is on the disk."""
    npz = tmp_path / "images.npz"
    flags = ["--workdir", alone, "--num", 10**6, "--npz", npz, "--out", tmp_path / "grid.png"]
    group = start(["sample", *flags])
    while not list(tmp_path.glob("images.npz.partial/*.npy")):
        assert all(process.poll() is None for process in group), finish(group)
        time.sleep(0.1)
    for process in group:
        process.send_signal(signal.SIGTERM)
    finish(group, status=-signal.SIGTERM, timeout=30)


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


def test_lists_are_those_of_the_first_process():
    assert hosts.agreed_numbers((3, 5)) == [3, 5]  # of one; of several: the slow tests


@pytest.mark.slow
def test_bad_input_ends_all_processes_with_status_2(start, tmp_path):
    group = start(train("tarflow", tmp_path / "run", train__batch_size=15))
    for _, said in finish(group, status=2, timeout=60):
        assert "config.train.batch_size 15 is not divisible" in said and "Traceback" not in said


@pytest.mark.slow
def test_bad_input_of_one_process_ends_the_others_too(start, tmp_path):
    """The first alone sees that the folder is taken."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, second = start(train("tarflow", workdir))
        _, said = first.communicate(timeout=100)
        assert first.returncode == 2 and "another process trains in" in said
        _, said = second.communicate(timeout=100)
    assert second.returncode not in (0, 2)
    assert re.search("it or another one failed|another task died|unhealthy|heartbeat", said), said


@pytest.mark.slow
def test_processes_train_sample_and_evaluate_as_one(start, alone, tmp_path):
    workdir = tmp_path / "run"
    (_, first), (_, second) = finish(start(train("tarflow", workdir)))
    assert "on 8 x cpu (data 4 and fsdp 2)" in first and "done: step 12" in first
    assert "step" not in second
    same_metrics(workdir, alone)

    ends = finish(start(["evaluate", "--workdir", workdir, "--draws", 1]))
    assert "bpd" in ends[0][0] and ends[1][0] == ""
    npz = tmp_path / "two.npz"
    arguments = ["sample", "--num", 20, "--out", tmp_path / "grid.png", "--npz"]
    ends = finish(start([*arguments, npz, "--workdir", workdir]))
    assert "20 samples of step 12" in ends[0][0] and ends[1][0] == ""
    finish(start([*arguments, tmp_path / "one.npz", "--workdir", workdir], processes=1))
    with np.load(npz) as two, np.load(tmp_path / "one.npz") as one:
        assert np.abs(two["images"].astype(int) - one["images"]).max() <= 1

    for mode, method in [("reconstruct", "cached"), ("interpolate", "auto"), ("trace", "cached")]:
        pictures = []
        for processes in (2, 1):
            out = tmp_path / f"{mode}{processes}.png"
            arguments = ["sample", "--workdir", workdir, "--mode", mode, "--num", 3, "--out", out]
            finish(start([*arguments, "--mesh", "fsdp=2,data=4", "--method", method], processes))
            with Image.open(out) as picture:
                pictures.append(np.asarray(picture).astype(int))
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, mode


@pytest.mark.slow
def test_processes_find_the_same_distances_as_one(start, alone, tmp_path):
    """Each reads its part of the data and of the samples; their statistics become one."""
    program = [small_network.__file__]
    found = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        shutil.copytree(alone, workdir)
        arguments = ["evaluate", "--workdir", workdir, "--batch_size", 16]
        reference = tmp_path / f"reference{processes}.npz"
        split = ["--reference_split", "train[:45]", "--reference", reference]
        finish(start([*arguments, *split, "--make_reference"], processes, program=program))
        metrics = [
            "--reference",
            reference,
            "--num_samples",
            30,
            "--metrics",
            "fid,sfid,kid,precision_recall,density_coverage",
        ]
        finish(start([*arguments, *metrics], processes, program=program))
        results = [json.loads(path.read_text()) for path in workdir.glob("evals/*num_samples*")]
        found[processes] = {result["metric"]: result["value"] for result in results}
    assert len(found[1]) == 7 and found[1]["fid"] > 0
    assert found[2] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_killed_run_goes_on_with_other_processes(start, alone, processes, tmp_path):
    workdir = tmp_path / "run"
    group = start(train("tarflow", workdir))
    wait_for_checkpoint(group, workdir, 5)
    for process in group:
        process.kill()
        process.communicate()
    finish(start(train("tarflow", workdir), processes=processes))
    same_metrics(workdir, alone)


@pytest.mark.slow
def test_when_one_process_dies_the_others_end(start, tmp_path):
    group = start(train("tarflow", tmp_path / "run", train__steps=10**6))
    wait_for_checkpoint(group, tmp_path / "run", 5)
    group[1].kill()
    before = time.monotonic()
    _, said = group[0].communicate(timeout=200)
    assert time.monotonic() - before < 120
    assert group[0].returncode not in (0, 2)
    assert re.search("it or another one failed|another task died|unhealthy|heartbeat", said), said


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_process_stops_all(start, alone, who, tmp_path):
    workdir = tmp_path / "run"
    group = start(train("tarflow", workdir))
    wait_for_checkpoint(group, workdir, 5)
    group[who].send_signal(signal.SIGTERM)
    ends = finish(group, status=128 + signal.SIGTERM)
    assert "all saved in" in ends[0][1]
    finish(start(train("tarflow", workdir)))
    same_metrics(workdir, alone)
