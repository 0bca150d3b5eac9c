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
KILLS = 3
TIMEOUT = 900  # seconds, on a machine with much else to do


def start(workdir, **variables):
    return tiny_runs.start(tiny_runs.arguments("tarflow", workdir, **FIELDS), **variables)


def finish(process, status=0) -> str:
    """What a process that has ended wrote to stderr."""
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return errors


def wait_for_step(workdir, step, process):
    """Until that step is logged, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while last_logged(workdir) < step and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_logged(workdir):
    """The step of the newest line of metrics, 0 without any."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'^{"step": (\d+),', path.read_text() if path.exists() else "", re.MULTILINE)
    return int(steps[-1]) if steps else 0


def test_a_run_that_is_killed_and_stopped_ends_the_same(tmp_path):
    """SIGKILL while it compiles, before its first save, and later; then SIGTERM; then Ctrl-C."""
    finish(start(tmp_path / "whole"))
    workdir = tmp_path / "run"
    chance = random.Random("kill")
    for kill in range(KILLS):
        compiles = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if kill == 0 else {}
        process = start(workdir, **compiles)
        if kill == 0:
            time.sleep(chance.uniform(0, 5))
        else:
            before = last_logged(workdir)
            step = 1 if kill == 1 else chance.randint(before + 1, before + (STEPS - before) // 3)
            wait_for_step(workdir, step, process)
            time.sleep(chance.uniform(0, 0.2))
        process.kill()
        finish(process, -signal.SIGKILL)
    assert last_logged(workdir) > 1, "no kill fell into a training under way"

    resumed = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(workdir)
        wait_for_step(workdir, last_logged(workdir) + 1, process)
        process.send_signal(number)
        *_, message = finish(process, 128 + number).splitlines()
        stopped = re.match(
            rf"stopped at step (\d+) of {STEPS}, all saved in .*run: run the", message
        )
        assert stopped and resumed < int(stopped[1]) < STEPS, message
        resumed = int(stopped[1])
    assert f"resumed at step {resumed} of {STEPS}" in finish(start(workdir))
    assert_same(remains(workdir), remains(tmp_path / "whole"))
