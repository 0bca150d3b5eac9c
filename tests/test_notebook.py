"""The notebook runs from its first cell to its last, after a shorter training."""

import json
import shlex
import subprocess
import sys

import pytest
import tiny_runs

NOTEBOOK = tiny_runs.ROOT / "docs" / "digits.ipynb"


def as_script() -> str:
    """Its code; a line with ! runs a command, and one with % is left out."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    lines = []
    for line in "\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "code"
    ).splitlines():
        command = line.strip().removeprefix("!")
        if command != line.strip():
            words = [sys.executable, "-m", *shlex.split(command)]
            line = line.partition("!")[0] + f"__import__('subprocess').run({words}, check=True)"
        lines.append(line)
    return "\n".join(line for line in lines if not line.strip().startswith("%"))


@pytest.mark.slow
def test_all_cells_run(tmp_path):
    script, steps = as_script(), "train.steps = 1500"
    assert steps in script and "model.encode" in script
    (tmp_path / "configs").symlink_to(tiny_runs.ROOT / "configs")
    (tmp_path / "notebook.py").write_text(script.replace(steps, "train.steps = 20"))
    env = tiny_runs.environment(MPLBACKEND="agg")
    run = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "most likely label:" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("latents (1, 16, 4) largest error")
