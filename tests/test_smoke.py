"""The smoke run of every config for a pod: trained, sampled from and evaluated, and two resumed."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
from PIL import Image

from jetflow import cli
from jetflow.files import read_metrics
from jetflow.training.log import SPEED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compilation_cache")]

CONFIGS = tiny_runs.ROOT / "configs"
ARGUMENTS = {
    "imagenet21k_jet": ["smoke", "32,smoke"],
    "imagenet_itarflow": ["smoke", "128,smoke", "256,smoke"],
    "imagenet64_tarflow": ["smoke", "unconditional,smoke", "conditional,smoke"],
}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if ":smoke" in path.read_text())
PRETRAINED = {
    "transfer_imagenet64_jet": "imagenet21k_jet-smoke",
    "transfer_cifar10_jet": "imagenet21k_jet-32,smoke",
}


RESUMED = {"imagenet64_jet-smoke", "imagenet64_tarflow-conditional,smoke"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smoke")


def smoke(runs: Path, name: str, argument: str) -> Path:
    """The workdir of a run, which is made only once."""
    workdir = runs / f"{name}-{argument}"
    arguments = ["train", "--config", f"{CONFIGS}/{name}.py:{argument}", "--workdir", str(workdir)]
    if source := PRETRAINED.get(name):
        arguments.append(f"--config.init_from={smoke(runs, *source.split('-'))}")
    if workdir.exists():
        return workdir
    assert cli.main(arguments) == 0
    if workdir.name in RESUMED:
        whole = read_metrics(workdir / "metrics.jsonl")
        for later in [*workdir.glob("checkpoints/8"), *workdir.glob("evals/*"),
                      *workdir.glob("samples/*")]:  # fmt: skip
            shutil.rmtree(later) if later.is_dir() else later.unlink()
        assert cli.main(arguments) == 0  # which resumes at step 4
        for again, before in zip(read_metrics(workdir / "metrics.jsonl"), whole, strict=True):
            assert {k: v for k, v in again.items() if k not in SPEED} == {
                k: v for k, v in before.items() if k not in SPEED
            }
    return workdir


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in NAMES for argument in ARGUMENTS.get(name, ["smoke"])],
)
def test_smoke(name, argument, runs, tmp_path, capsys):
    workdir = smoke(runs, name, argument)
    printed = capsys.readouterr().err
    assert ("resumed at step 4 of 8" in printed) == (workdir.name in RESUMED)
    shape = tuple(json.loads((workdir / "config.json").read_text())["resolved"]["image_shape"])
    out = tmp_path / "grid.png"
    assert cli.main(["sample", "--workdir", str(workdir), "--num", "4", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > shape[0]
    assert cli.main(["evaluate", "--workdir", str(workdir), "--draws", "1"]) == 0
    assert " on shapes/" in capsys.readouterr().out
    result = json.loads((workdir / "evals" / "bpd-00000008.json").read_text())
    assert 0 < result["value"] < 20
    assert result["data"]["name"] == f"shapes/{shape[0]}"


def test_every_row_has_a_smoke_run():
    assert {"imagenet64_jet", "imagenet32_jet", "imagenet128_tarflow", "afhq256_tarflow"} < {*NAMES}
    assert len(NAMES) == 9
