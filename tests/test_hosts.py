"""Several processes: two of four CPU devices each, joined over the loopback."""

import errno
import fcntl
import functools
import json
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import small_network
import tiny_runs

from jetflow import cli, hosts
from jetflow.cli.flags import parse
from jetflow.data.dataset import load

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
    """A function: starts command lines on several processes, which share eight devices."""
    started = []

    def run(*lines, processes=2, **options) -> list[subprocess.Popen]:
        """One command line for all of them, or one for each of the first ones."""
        options |= {"JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
        if processes > 1:
            options |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{tiny_runs.free_port()}"}
            options |= {"JAX_NUM_PROCESSES": str(processes)}
        lines = lines if len(lines) > 1 else lines * processes
        group = [
            tiny_runs.start([*map(str, line)], JAX_PROCESS_ID=str(number), **options)
            for number, line in enumerate(lines)
            if line
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
    ("number", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and"),
        ({"JAX_NUM_PROCESSES": "two"}, "is 'two' in the environment; expected a whole number"),
    ],
)
def test_a_process_that_cannot_know_the_others_is_refused(number, message):
    command = ["sample", "--workdir", "nothing"]
    process = tiny_runs.start(command, JAX_COORDINATOR_ADDRESS="localhost:1", **number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and errors.count("\n") == 1 and message in errors


SWEEP = ["sweep", "--sweep", tiny_runs.ROOT / "configs" / "sweeps" / "guidance.py"]
CONFIG = ("train", "--config", tiny_runs.ROOT / "configs" / "digits_tarflow.py")


@pytest.mark.parametrize(
    ("line", "more", "differing"),
    [
        (CONFIG, ("--config.optim.lr=0.1", "--config.train.seed=3"), "optim.lr train.seed"),
        (CONFIG, ("--config.train.steps=14", "--extend"), "train.steps --extend"),
        (CONFIG, ("--config.flow.width=64", "--data_dir=another"), "flow.width"),
        (CONFIG, ("--workdir=another",), "--workdir"),
        (("evaluate",), ("--draws=3", "--metrics=fid"), "--draws --metrics"),
        (("sample",), ("--num=8", "--guidance=1"), "--num --guidance"),
        (("sweep", "--sweep=a.py"), ("--fix=seed=1",), "--fix"),
    ],
)
def test_what_processes_must_be_asked_for(line, more, differing):
    """All but where the data lies, which may differ from machine to machine."""

    def facts(*arguments):
        command, argv = cli.find([str(argument) for argument in arguments])
        return cli.facts(argv[0], parse(command, argv))

    one, other = facts(*line, "--workdir=run"), facts(*line, "--workdir=run", *more)
    assert one.keys() == other.keys()
    names = [name.removeprefix("config.") for name in one if str(one[name]) != str(other[name])]
    assert {*names} == {*differing.split()}


# Joins, with facts; loads a data set, if a folder is given; and waits until it is ended.
QUICK = """
import json, os, sys, time
from jetflow import hosts, rollcall
hosts.LAST_WORDS_SECONDS, hosts.rendezvous.NOTICE_SECONDS = 1, 600  # lines are counted
rollcall.BEAT_SECONDS, rollcall.SILENCE_SECONDS, rollcall.STALL_SECONDS = 0.5, 3, 5
"""
PROGRAM = (
    QUICK
    + """
facts, *data_dir = map(json.loads, sys.argv[1:])
with hosts.joined(facts, None, saves_at_signals=False):
    if data_dir:
        from jetflow.data.dataset import load
        load("digits", "train", data_dir=data_dir[0])
    time.sleep(4 * rollcall.BEAT_SECONDS)  # until they have heard of each other
    print("joined", file=sys.__stdout__, flush=True)
    time.sleep(600)
"""
)
program = functools.partial(dict, program=["-c", PROGRAM])


def test_processes_that_differ_end(start):
    facts = {"lr": 0.1, "width": 32, "seed": 0}, {"lr": 0.2, "seed": 0, "steps": 7}
    group = start(*([json.dumps(each)] for each in facts), **program())
    (_, first), (_, second) = finish(group, status=2)
    assert first == second and first.count("\n") == 1
    for name, here, there in (("lr", 0.1, 0.2), ("width", 32, "absent"), ("steps", "absent", 7)):
        assert f"{name} is {here} on process 0 and {there} on process 1" in first
    assert "seed" not in first


@pytest.mark.slow
def test_processes_with_other_code_or_data_end(start, data_dir, tmp_path):
    load("digits", "train")
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    file = next((tmp_path / "digits").rglob("metadata.json"))
    file.write_text(re.sub(r'("train": ")[0-9a-f]{4}', r"\1abcd", file.read_text()))
    group = start(*(["{}", json.dumps(str(path))] for path in (data_dir, tmp_path)), **program())
    for _, errors in finish(group, status=2):
        assert re.search("checksum of digits train is [0-9a-f]* on process 0 and abcd", errors)
    code = shutil.copytree(tiny_runs.ROOT / "jetflow", tmp_path / "jetflow")
    with open(code / "types.py", "a") as file:
        file.write("# changed\n")
    switch = "import sys; sys.path.insert(0, sys.argv.pop(1))" + PROGRAM
    group = start(*([path, "{}"] for path in (tiny_runs.ROOT, tmp_path)), program=["-c", switch])
    for _, errors in finish(group, status=2):
        assert "jetflow's code" in errors.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_name_a_process_that_is_lost(start, lost, number):
    group = start(["{}"], **program())
    for process in group:
        assert "joined" in process.stdout.readline()
    group[lost].send_signal(number)
    other = group[1 - lost]
    _, errors = other.communicate(timeout=600)
    assert other.returncode == 1
    assert re.match(
        rf"jetflow: process {1 - lost} of 2 ends, as nothing was heard of process {lost} since "
        r"\d\d:\d\d:\d\d, when it was at .*; run the same command",
        errors.splitlines()[-1],
    )
    if number == signal.SIGSTOP or lost == 1:  # JAX itself ends those who lose the first
        assert errors.count("\n") == 1


# Three steps together; at the second one process sleeps.
STEPS = """
rollcall.PATIENCE_SECONDS, on_stall, sleeper, seconds = 10, *sys.argv[1:4]
with hosts.joined({}, hosts.ProcessOptions(on_stall=on_stall), saves_at_signals=False):
    time.sleep(4 * rollcall.BEAT_SECONDS)  # until they have heard of each other
    for step in range(3):
        rollcall.reach(f"step {step}")
        if step == 1 and os.environ["JAX_PROCESS_ID"] == sleeper:
            print("sleeps", file=sys.__stdout__, flush=True)
            time.sleep(float(seconds))
        hosts.failing(False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_stopped_is_awaited_and_goes_on(start, lost):
    group = start(["wait", lost, 5], program=["-c", QUICK + STEPS])
    while "sleeps" not in group[lost].stdout.readline():
        pass
    group[lost].send_signal(signal.SIGSTOP)
    notice = group[1 - lost].stderr.readline()  # by its silence, or by its position
    assert re.match(f"jetflow: (nothing was heard of process {lost} |process {lost} has)", notice)
    group[lost].send_signal(signal.SIGCONT)
    finish(group)


@pytest.mark.slow
def test_a_process_that_does_not_get_on_ends_the_run(start):
    """It is alive, but its disk may hang; it hears of that itself."""
    (_, other), (_, own) = finish(start(["end", 1, 600], program=["-c", QUICK + STEPS]), status=1)
    text = "has been at step 1 since .*, and {} is at the barrier after step 1"
    for errors, who, front in ((other, "process 1", "this one"), (own, "this one", "process 0")):
        notice, *_, end = errors.splitlines()  # a busy machine may say it twice
        assert re.match(f"jetflow: {who} {text.format(front)}$", notice)
        assert re.match(f"jetflow: process . of 2 ends, as {who} {text.format(front)}; run", end)


# A command of `jetflow`, of whose processes one reads its part of a checkpoint late.
LATE = """
import jetflow.checkpoint
seconds, late, read = float(sys.argv.pop(1)), sys.argv.pop(1), jetflow.checkpoint._read_arrays
rollcall.STALL_SECONDS = seconds / 2  # a busy machine is silent for some seconds, too
def read_late(*arguments):
    time.sleep(seconds if os.environ["JAX_PROCESS_ID"] == late else 0)
    return read(*arguments)
jetflow.checkpoint._read_arrays = read_late
from jetflow.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_may_read_its_checkpoint_late(start, alone, tmp_path, late):
    """For twice as long as what makes the others name it."""
    workdir = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    line, program = train("tarflow", workdir), ["-c", QUICK + LATE]
    group = start([40, late, *line], program=program)
    ends = finish(group)
    assert f"process {late} has been at reading a checkpoint" in ends[1 - late][1]
    assert "done: step 12" in ends[0][1]
    tiny_runs.assert_metrics_near(workdir, alone, rel=1e-6)


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
    tiny_runs.assert_metrics_near(workdir, alone, rel=1e-6)


@pytest.mark.slow
def test_processes_sample_and_evaluate_as_one(start, alone, tmp_path):
    results = {}
    for processes in (1, 2):
        workdir = shutil.copytree(alone, tmp_path / str(processes))
        shutil.rmtree(workdir / "evals")
        ends = finish(start(["evaluate", "--workdir", workdir, "--draws", 1], processes=processes))
        npz, out = tmp_path / f"{processes}.npz", tmp_path / "grid.png"
        flags = ["--workdir", workdir, "--mesh", "fsdp=2,data=4", "--out", out]
        ends += finish(start(["sample", *flags, "--num", 20, "--npz", npz], processes=processes))
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
            line, options = [*arguments, *flags], {"program": [small_network.__file__]}
            finish(start(line, processes=processes, **options))
        results = [json.loads(path.read_text()) for path in workdir.glob("evals/*num_samples*")]
        values[processes] = {result["metric"]: result["value"] for result in results}
    assert len(values[1]) == 7 and values[1]["fid"] > 0
    assert values[2] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
def test_when_a_process_of_a_training_dies_the_others_end(start, tmp_path):
    group = start(train("tarflow", tmp_path / "run", train__steps=10**6))
    wait_for_checkpoint(group, tmp_path / "run", 5)
    group[1].kill()
    _, errors = group[0].communicate(timeout=600)
    assert group[0].returncode == 1
    assert "nothing was heard of process 1" in errors.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "other", "fact"),
    [
        (["evaluate"], ["evaluate", "--draws", 3], "--draws is None"),
        (["sample"], ["sample", "--num", 3], "--num is None"),
        (["sample"], ["evaluate"], "the command is sample"),
        (SWEEP, [*SWEEP, "--fix", "seed=1"], "--fix is None"),
    ],
)
def test_commands_that_differ_end(start, tmp_path, line, other, fact):
    group = start([*line, "--workdir", tmp_path], [*other, "--workdir", tmp_path])
    for _, errors in finish(group, status=2):
        assert f"{fact} on process 0 and " in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_trainings_that_differ_leave_the_workdir_alone(start, alone, tmp_path, begun):
    """Also where a run goes on; bad input that they share ends both alike."""
    workdir = tmp_path / "run"
    if begun:
        shutil.copytree(alone, workdir)
    config = workdir / "config.json"
    before = config.read_text() if begun else None
    longer = train("tarflow", workdir, train__steps=14, optim__lr=0.1)
    for _, errors in finish(start(train("tarflow", workdir), longer), status=2):
        assert "config.train.steps is 12 on process 0 and 14 on process 1" in errors
        assert "config.optim.lr" in errors and "Traceback" not in errors
    if begun:
        for _, errors in finish(start(train("tarflow", workdir, optim__lr=0.1)), status=2):
            assert "holds a run with another config: config.optim.lr is" in errors
    for _, errors in finish(start(train("tarflow", workdir, train__batch_size=15)), status=2):
        assert "config.train.batch_size 15 is not divisible" in errors
        assert "Traceback" not in errors
    assert (config.read_text() if config.exists() else None) == before
