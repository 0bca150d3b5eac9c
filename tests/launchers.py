"""What the tests of the launchers share: scripts that stand in for programs, and waiting."""

import importlib.util
import os
import subprocess
import sys
import time

import tiny_runs

LAUNCH = tiny_runs.ROOT / "launch"
TIMEOUT = 600  # seconds, on a machine with much else to do

JETFLOW_HERE = f'exec {sys.executable} -m jetflow "$@"\n'


def run(*command, env=None, timeout=TIMEOUT, **options):
    return subprocess.run(
        [str(part) for part in command], env=env, timeout=timeout, capture_output=True, text=True,
        **options,
    )  # fmt: skip


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def script(path, text):
    """An executable for a PATH."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


def without_slurm():
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def load_gke():
    """launch/gke.py as a module."""
    spec = importlib.util.spec_from_file_location("gke", LAUNCH / "gke.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
