"""What the README says can be run as it stands."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import small_network

from jetflow import cli, configs, sweeps
from jetflow.cli.flags import parse
from jetflow.flows.build import build
from jetflow.tools.sweep.runner import Runner
from jetflow.tools.sweep.store import Store

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCALING = (ROOT / "docs" / "scaling.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_python_example():
    example, *_ = blocks("python")
    names = {}
    exec(example, names)
    assert names["images"].shape == (4, 16, 16, 3)
    assert names["images"].dtype == "uint8"
    assert names["bits"].shape == (8,)


def test_trained_flow_example(trained, tmp_path, monkeypatch):
    """With a small network in the place of Inception."""
    shutil.copytree(trained("tarflow"), tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    small_network.install(monkeypatch)
    _, example, *_ = blocks("python")
    names = {}
    exec(example, names)
    assert names["sevens"].shape == (16, 8, 8, 1)
    assert names["bits"].shape == (16,)
    np.testing.assert_array_equal(names["again"], names["sevens"])
    assert [record["metric"] for record in names["records"]] == ["bpd", "fid"]
    assert all(record["value"] > 0 for record in names["records"])


def test_config_example(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [block for block in blocks("python") if "get_config" in block]
    path = tmp_path / "own.py"
    path.write_text(example)
    config = configs.read(str(path))
    assert config.flow.width == 256
    assert build(config.flow, image_shape=(32, 32, 3)).latent_shape == (256, 12)


def test_sweep_example(tmp_path):
    *_, example = blocks("python")
    path = tmp_path / "own.py"
    path.write_text(example.replace("../", f"{ROOT}/configs/"))
    sweep = sweeps.read(str(path))
    assert len(sweep.points) == 6
    Runner(sweep, Store(tmp_path)).check()


def test_commands_parse(monkeypatch):
    """Those in blocks, and those in the cells of tables."""
    monkeypatch.chdir(ROOT)
    commands = [
        part
        for block in blocks("bash") + blocks("bash", SCALING)
        for line in block.splitlines()
        for part in line.partition("#")[0].split("&&")
        if part.strip().startswith("jetflow ")
    ]
    assert len(commands) >= 5
    tables = re.findall(r"\| `(jetflow [^`]*)` \|$", README + SCALING, flags=re.MULTILINE)
    assert len(tables) >= 15
    for line in [*commands, *tables]:
        name, *arguments = shlex.split(line)[1:]
        parse(*cli.find([name, *arguments]))
