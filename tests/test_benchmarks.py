"""The script for a card, at toy size on CPUs; and the PyTorch TarFlow that it measures against."""

import argparse
import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flow_laws import random_images, random_variables, tarflow

from jetflow import convert

sys.path.insert(0, str(tiny_runs.ROOT / "benchmarks"))

import gpu
import gpu_sizes
import gpu_tasks

IMAGE = (8, 8, 3)


@pytest.fixture(scope="module")
def torch_tarflow():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return pytest.importorskip("torch_tarflow")


@pytest.fixture(scope="module")
def both(tmp_path_factory, torch_tarflow):
    """A TarFlow, its variables and images, and the same flow in PyTorch."""
    sizes = dict(patch_size=2, width=128, num_blocks=3, layers_per_block=2)
    flow = tarflow(IMAGE, pixel_scale=127.5, head_dim=64, dtype="float32", **sizes)
    variables = jax.tree.map_with_path(moderate, random_variables(flow, jnp.float32))
    path = tmp_path_factory.mktemp("torch") / "weights.pth"
    convert.to_tarflow(path, flow, variables)
    other = torch_tarflow.TarFlow(IMAGE, patch_size=2, width=128, blocks=3, layers=2)
    other.load(path)
    return flow, variables, random_images(flow).astype(jnp.float32), other


def moderate(path, leaf):
    """Wide nets with random weights overflow after a few blocks."""
    return 0.03 * leaf if "proj_out" in jax.tree_util.keystr(path) else leaf


def test_pytorch_computes_the_same_latents(both):
    """In float32, to rounding: else its speed would be that of something else."""
    import torch

    flow, variables, images, other = both
    z, logdet = flow.apply(variables, images, method="forward")
    assert np.abs(z - flow.pixels.forward(images)[0]).max() > 0.1  # far from the identity
    with torch.no_grad():
        z_torch, logdet_torch = other(torch.tensor(np.array(images)))
    np.testing.assert_allclose(z_torch, z, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logdet_torch, logdet, rtol=1e-5)


@pytest.mark.parametrize("graphs", [False, True])
def test_pytorch_samples_invert(graphs, both, torch_tarflow):
    """Token by token, and by the steps that a GPU records."""
    import torch

    class Sampler(torch_tarflow.Sampler):
        def _graph(self, number, length):
            return types.SimpleNamespace(replay=lambda: self._step(number, length, masked=True))

    *_, images, other = both
    pixels = torch.tensor(np.array(images))
    with torch.no_grad():
        z, _ = other(pixels)
    sampler = Sampler(other, len(pixels), torch.float32, graphs)
    np.testing.assert_allclose(sampler.sample(z), pixels, atol=1e-2)  # in units of 0..256
    np.testing.assert_allclose(sampler.sample(z.flip(0)), pixels.flip(0), atol=1e-2)


def test_pytorch_trains(torch_tarflow):
    import torch

    flow = torch_tarflow.TarFlow((4, 4, 3), patch_size=2, width=64, blocks=2, layers=1)
    trainer = torch_tarflow.Trainer(flow, noise_std=0.05)
    images = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8)
    losses = [float(trainer.step(images)) for _ in range(10)]
    assert losses[-1] < losses[0]


# The script


@pytest.fixture
def setting(trained, tmp_path):
    """In toy size, with a run for the TarFlow that is sampled."""
    shutil.copytree(trained("volume preserving"), tmp_path / "fit")
    return gpu_sizes.Setting(gpu_sizes.SIZES["toy"], tmp_path, seconds=60)


def records(setting, task):
    name, *words = task.split()
    return [*gpu_tasks.TASKS[name](setting, *words)]


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("task", ["train tarflow xla full", "train jet auto none"])
def test_training_steps(task, setting):
    [line] = records(setting, task)
    assert (line["flow"], line["attention"], line["batch_size"]) == (task.split()[1], "xla", 4)
    assert line["step_seconds"] > 0 and line["peak_bytes"] > 0 and line["model_flops"] > 0


@pytest.mark.usefixtures("compilation_cache")
def test_samples_and_likelihoods(setting):
    [line] = records(setting, "sample cached")
    assert line["method"] == "cached" and line["batch_size"] == 2 and line["seconds"] > 0
    exact, *_, narrow = records(setting, "bpd")
    assert exact["difference"] == 0 and narrow["dtype"] == "bfloat16"
    assert 0 < abs(narrow["difference"]) <= narrow["largest_difference"] < 0.1


@pytest.mark.usefixtures("compilation_cache")
def test_a_task_is_a_process_with_a_bound(tmp_path):
    arguments = argparse.Namespace(scratch=tmp_path, size="toy")
    [line], outcome = gpu.run_task("peak jetflow", 120, arguments)
    assert outcome == "done" and line["tflops"] > 0
    assert gpu.run_task("peak jetflow", 0.05, arguments) == ([], "cut off after 0 s")
    refused = gpu.run_task("train tarflow cudnn full", 120, arguments)
    assert refused[1].startswith("skipped: config.flow.attention is 'cudnn'")
    failed = gpu.run_task("bpd", 120, arguments)  # there is no trained TarFlow
    assert failed[0] == [] and failed[1].startswith("skipped: ") and "fit" in failed[1]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ModuleNotFoundError("No module", name="torch"), gpu.SKIPPED, "torch is not installed"),
        (gpu_sizes.Skip("no GPU"), gpu.SKIPPED, "no GPU"),
        (MemoryError("out of\n memory"), 1, "MemoryError: out of memory"),
    ],
)
def test_a_task_that_fails_says_why(error, status, reason, monkeypatch, tmp_path, capsys):
    """In the last line, after what it measured before."""

    def task(setting):
        yield {"measured": 1}
        raise error

    monkeypatch.setitem(gpu_tasks.TASKS, "peak", task)
    results = tmp_path / "results"
    arguments = argparse.Namespace(
        task=["peak", results], scratch=tmp_path, size="toy", seconds=1.0
    )
    assert gpu.do_task(arguments) == status
    assert capsys.readouterr().err.splitlines()[-1].endswith(reason)
    assert json.loads(results.read_text()) == {"measured": 1}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--out", "gpu", "--parts", "peak,speed"], "--parts has speed; expected some of peak,"),
        (["--size", "toy"], "--out is missing"),
        (["--out", "gpu"], "no NVIDIA card; --size toy"),
    ],
)
def test_refusals(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "cards", list)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_reports_add_up(tmp_path):
    """A later call keeps the parts of an earlier one, and its peak counts."""
    step = {"flow": "tarflow", "batch_size": 4, "step_seconds": 0.5}
    first = gpu.Report(tmp_path, ["peak", "train"], "toy")
    first.add("peak", "peak jetflow", [{"by": "jetflow", "size": 8, "tflops": 100.0}], "done", 1.0)
    first.add("train", "train tarflow xla full", [step | {"model_flops": 2e13}], "done", 1.0)
    second = gpu.Report(tmp_path, ["torch"], "toy")
    second.add("torch", "torch_train", [step | {"step_seconds": 1.0}], "cut off after 3 s", 1.0)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["train"][0]["records"][0]["share_of_peak"] == pytest.approx(0.4)
    assert parts["torch"][0]["records"][0]["share_of_peak"] == pytest.approx(0.2)
    text = (tmp_path / "gpu.md").read_text()
    assert "40.0%" in text and "20.0%" in text and "- `torch_train`: cut off after 3 s" in text
    assert list(gpu.Report(tmp_path, ["peak"], "full").content["parts"]) == []


@pytest.mark.slow
@pytest.mark.usefixtures("compilation_cache")
def test_the_script(tmp_path):
    """As a user calls it; on a CPU a run that is killed ends bit for bit as another."""
    parts = ["sample", "resume"]
    command = [sys.executable, gpu.__file__, "--size", "toy", "--parts", ",".join(parts)]
    command += ["--seconds", "600", "--minutes", "20", "--scratch", str(tmp_path / "scratch")]
    subprocess.run([*command, "--out", str(tmp_path)], check=True)
    done = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    tasks = {entry["task"]: entry for part in parts for entry in done[part]}
    for name in ("fit", "sample cached", "sample jacobi", "sample auto", "resume plain"):
        assert tasks[name]["outcome"] == "done" and tasks[name]["records"]
    [line] = tasks["resume plain"]["records"]
    assert line["bit_for_bit"] and line["first_step_that_differs"] is None
    assert line["resumed_from"] <= line["killed_at"] < line["steps"]
