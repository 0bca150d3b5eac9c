"""A wheel, installed away from the clone, has all that it needs."""

import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny_runs

SMALL = ("train.steps=2", "train.log_every=1", "flow.width=16", "flow.head_dim=8", "eval.draws=1",
         "flow.num_blocks=1", "flow.layers_per_block=(1,)", "eval.samples=2")  # fmt: skip


@pytest.mark.slow
def test_a_wheel_trains_by_its_own_configs(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("jetflow", "configs"):
        shutil.copytree(tiny_runs.ROOT / folder, source / folder, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny_runs.ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([*pip, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)
    command = [sys.executable, "-m", "jetflow", "train", "--workdir", "run", "--config"]
    command += ["jetflow://configs/digits_tarflow.py", *(f"--config.{field}" for field in SMALL)]
    env = tiny_runs.environment(PYTHONPATH=str(site))
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()
