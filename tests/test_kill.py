"""Real processes, killed at any moment and started again, end as if they had never been killed."""

import random
import re
import signal
import time

import pytest
import tiny_runs
from tiny_runs import assert_same, remains

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compilation_cache")]

STEPS = 60
# Saves, evaluations and pictures take most of the time, so that many kills fall into them. Plain
# samples, for they compile faster.
FIELDS = {
    "train__steps": STEPS,
    "train__checkpoint_every": 4,
    "train__eval_every": 6,
    "train__sample_every": 10,
    "train__log_every": 3,
    "eval__guidance": 0.0,
    "eval__denoise": False,
}
KILLS = 5
TIMEOUT = 180  # seconds


def start(name, workdir, **variables):
    variables |= tiny_runs.UNOPTIMISED
    return tiny_runs.start(tiny_runs.arguments(name, workdir, **FIELDS), **variables)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function: the name of a flow -> what a run of it leaves that was never killed."""
    known = {}

    def run(name):
        if name not in known:
            workdir = tmp_path_factory.mktemp("uninterrupted") / name
            process = start(name, workdir)
            _, said = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, said
            known[name] = remains(workdir)
        return known[name]

    return run


def wait_for(condition, process):
    """Until it holds, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_logged(workdir):
    """The step of the newest line of metrics, 0 without any."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'^{"step": (\d+),', path.read_text() if path.exists() else "", re.MULTILINE)
    return int(steps[-1]) if steps else 0


def checkpoints(workdir):
    """The names of the checkpoints, of which some may be half written."""
    return sorted(path.name for path in (workdir / "checkpoints").glob("*"))


def resumed(step):
    """What a run says of where it begins."""
    return f"resumed at step {step} of {STEPS}" if step else f"{STEPS} steps of"


@pytest.mark.parametrize("name", ["jet", "tarflow"])
def test_killed_runs_end_the_same(name, uninterrupted, tmp_path):
    expected = uninterrupted(name)
    chance = random.Random(f"kill {name}")
    moments = []
    for kill in range(KILLS):
        compiles = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if kill == 0 else {}
        process = start(name, tmp_path, **compiles)
        if kill == 0:  # it starts up or compiles
            time.sleep(chance.uniform(0, 5))
        else:  # before it has saved anything; then at a later step, and within the time of a few
            before = last_logged(tmp_path)
            step = 1 if kill == 1 else chance.randint(before + 1, before + (STEPS - before) // 2)
            wait_for(lambda step=step: last_logged(tmp_path) >= step, process)
            time.sleep(chance.uniform(0, 0.2))
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        moments.append((last_logged(tmp_path), checkpoints(tmp_path)))
    print(f"{name}: killed at (last step logged, checkpoints): {moments}")
    assert moments[1][0] < moments[-1][0], "no kill fell into a training under way"

    process = start(name, tmp_path)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    assert_same(remains(tmp_path), expected)


def test_signals(uninterrupted, tmp_path):
    """SIGTERM, then Ctrl-C: each stops the run, and the same command goes on from there."""
    start_step = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start("tarflow", tmp_path)
        wait_for(lambda before=start_step: last_logged(tmp_path) > before, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
        assert resumed(start_step) in said
        message = re.fullmatch(
            rf"stopped at step (\d+) of {STEPS}, all saved in {re.escape(str(tmp_path))}: "
            "run the same command again to go on",
            said.splitlines()[-1],
        )
        assert message, said
        stopped, _ = tiny_runs.read_state(tmp_path)
        assert start_step < stopped == int(message[1]) < STEPS
        start_step = stopped

    process = start("tarflow", tmp_path)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    assert resumed(start_step) in said
    assert_same(remains(tmp_path), uninterrupted("tarflow"))
