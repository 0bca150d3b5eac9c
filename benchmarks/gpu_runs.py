"""The tasks of benchmarks/gpu.py that train by `jetflow train`: for weights, and for its resume."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_sizes import DATA, Result, Setting, Skip


def fit(setting: Setting) -> Result:
    """Train it for a part of the time that there is, and write its weights for PyTorch."""
    if not setting.weights.exists():
        command = setting.training("likelihood", DATA | setting.size.fit, setting.fit)
        with started(command) as process:
            stop_after(process, setting.fit, seconds=min(setting.seconds / 4, 120))
    import jetflow
    from jetflow import convert

    model = jetflow.load_model(setting.fit)
    setting.weights.unlink(missing_ok=True)
    convert.to_tarflow(setting.weights, model.flow, model.variables)
    bits = last_metrics(setting.fit)["bpd"]
    yield {"step": model.step, "data": model.config["data"]["name"], "bpd": round(bits, 4)}


# Resume


def resume(setting: Setting, how: str) -> Result:
    """A run that is killed and started again, against one that is not, at the same time.

    Args:
        how: "plain", or "deterministic", with the XLA flag of this meaning.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if how == "deterministic" and setting.size.for_cpu:
        raise Skip("the flag is for GPUs")
    if how == "deterministic":
        flags += " --xla_gpu_deterministic_ops=true"
    fields = DATA | setting.size.resume | {"train.log_every": 1}
    steps, every = fields["train.steps"], fields["train.checkpoint_every"]
    folders = [setting.scratch / f"{name}_{how}" for name in ("whole", "killed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    commands = [setting.training("likelihood", fields, folder) for folder in folders]
    # No stored programs: a restart on another day has none either.
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with started(commands[0], environment) as whole, started(commands[1], environment) as killed:
        while last_metrics(folders[1]).get("step", 0) < 2 * every + every // 2:
            if killed.poll() is not None:
                raise RuntimeError("the run ended before it could be killed")
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        at, saved = last_metrics(folders[1])["step"], checkpoints(folders[1])
        check(subprocess.run(commands[1], env=environment, check=False).returncode)
        check(whole.wait())
    sums = [checksums(folder, steps) for folder in folders]
    differing = [name for name in sums[0] if sums[0][name] != sums[1][name]]
    yield {
        "how": how,
        "steps": steps,
        "killed_at": at,
        "resumed_from": saved[-1],
        "arrays": len(sums[0]),
        "differing_arrays": len(differing),
        "bit_for_bit": not differing and sums[0].keys() == sums[1].keys(),
        # Up to the step it resumed from, two runs differ; after it, the resumption does.
        "first_step_that_differs": first_difference(*folders),
    }


def checkpoints(workdir: Path) -> list[int]:
    """The steps that are saved in whole; others have longer names."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def checksums(workdir: Path, step: int) -> dict[str, Any]:
    """Of each array of a checkpoint, as it was saved."""
    record = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(record.read_text())["arrays"]


def first_difference(one: Path, other: Path) -> int | None:
    """The first step whose loss or gradient differs between two runs."""
    losses = [
        {line["step"]: (line["bpd"], line["gradient_norm"]) for line in metrics(folder)
         if "gradient_norm" in line}
        for folder in (one, other)
    ]  # fmt: skip
    return next((step for step in losses[0] if losses[0][step] != losses[1].get(step)), None)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    path, lines = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def last_metrics(workdir: Path) -> dict[str, Any]:
    """Step and bits per dimension of the newest step that is logged."""
    lines = [line for line in metrics(workdir) if "gradient_norm" in line]
    return {name: lines[-1][name] for name in ("step", "bpd")} if lines else {}


@contextlib.contextmanager
def started(command: list[str], environment: Any = None) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block."""
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def stop_after(process: subprocess.Popen, workdir: Path, seconds: float) -> None:
    """Let a training save and end, so many seconds after its first step."""
    while not last_metrics(workdir) and process.poll() is None:
        time.sleep(0.1)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    check(process.wait(), 128 + signal.SIGTERM)


def check(status: int, *others: int) -> None:
    if status not in (0, *others):
        raise RuntimeError(f"a training ended with status {status}")


TASKS: dict[str, Callable[..., Result]] = {"fit": fit, "resume": resume}
