"""A run's folder: its resolved config, its flow, and the results of evaluations."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jetflow import hosts
from jetflow.checkpoint import Checkpoints
from jetflow.files import write_atomically
from jetflow.flows.build import build
from jetflow.training.log import METRICS, read_metrics
from jetflow.types import Flow, UsageError

CONFIG = "config.json"
SWEEP = "sweep.json"  # in the folder of a sweep
LOCK = ".lock"
LONGEST_SUFFIX = 120  # letters, of the at most 255 bytes of a file's name


def read_flow(workdir: Path, **overrides: Any) -> tuple[dict[str, Any], Flow, str]:
    """The config of a run, its flow, and the field of its checkpoints with the weights to use.

    Args:
        overrides: fields of `config.flow` to change.

    Raises:
        UsageError: if there is no run.
    """
    config = read_config(workdir)
    if config is None:
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            config = checkpoints.restore_config() if checkpoints.latest() is not None else None
    if config is None:
        raise UsageError(
            f"no run in {workdir} (it has neither {CONFIG} nor checkpoints); "
            f"start one with `jetflow train --config … --workdir {workdir}`"
        )
    resolved = config["resolved"]
    flow = build(
        config["flow"] | overrides,
        image_shape=tuple(resolved["image_shape"]),
        num_classes=resolved["num_classes"],
    )
    return config, flow, "ema" if config["train"]["ema_decay"] else "params"


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run in `workdir`, or None if there is no run."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not readable JSON ({error}); restore it") from error


@contextlib.contextmanager
def claimed(workdir: Path, config: dict[str, Any]) -> Iterator[None]:
    """Make `workdir` the folder of a run with this config, and keep other trainings out.

    Out as long as in this context: the lock goes with the process, however it ends. Of several
    processes the first one sees to it.

    Raises:
        UsageError: if another run lives there (the message names the fields that differ; one that
            never made a step gives way; mesh and workers may differ), if a process trains there, or
            it cannot be written.
    """
    if not hosts.is_first():
        yield
        return
    config = json.loads(json.dumps(config))
    if (workdir / SWEEP).exists():
        raise UsageError(f"{workdir} holds a sweep; give another --workdir")
    existing = read_config(workdir)
    differences = [] if existing is None else _differences(existing, config)
    if differences and _has_begun(workdir):
        raise UsageError(
            f"{workdir} holds a run with another config: {', '.join(differences)}; "
            "give that config to go on with it, or another --workdir for a new run, which can "
            f"start from these weights: --config.init_from={workdir}"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise UsageError(
            f"--workdir {workdir} cannot be written ({error}); give a folder that can"
        ) from error
    with hosts.locked(workdir / LOCK, wait=False) as mine:
        if not mine:
            raise UsageError(
                f"another process trains in {workdir}; wait for its end, or give another --workdir"
            )
        if existing != config:
            write_json(workdir / CONFIG, config)
        yield


def result_path(workdir: Path, metric: str, step: int, suffix: str = "") -> Path:
    """Where the value of a metric at a step is written."""
    return workdir / "evals" / f"{metric}-{step:08d}{suffix}.json"


def suffix(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """What tells the file of a result from that of the default settings: "-seed=1,split=train".

    Settings that are as by default are left out. A long list is cut, and a hash of all of it added.
    """
    given = {name: value for name, value in settings.items() if value != defaults.get(name)}
    if not given:
        return ""
    text = ",".join(f"{name}={quote(str(given[name]), safe='')}" for name in sorted(given))
    if len(text) > LONGEST_SUFFIX:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = f"{text[:LONGEST_SUFFIX]}-{digest}"
    return f"-{text}"


def write_result(workdir: Path, result: dict[str, Any], suffix: str = "") -> Path:
    """Write what an evaluation found; `result` has a metric and a step."""
    path = result_path(workdir, result["metric"], result["step"], suffix)
    write_json(path, result)
    return path


def read_result(workdir: Path, metric: str, step: int) -> dict[str, Any]:
    return json.loads(result_path(workdir, metric, step).read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, on the first process; a reader never sees half of it."""
    if not hosts.is_first():
        return
    text = json.dumps(content, indent=2) + "\n"
    with write_atomically(path) as file:
        file.write(text.encode())


def _has_begun(workdir: Path) -> bool:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return bool(checkpoints.steps()) or bool(read_metrics(workdir / METRICS))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What sets two runs apart, the first fields only; mesh and workers are no part of a run."""
    there, here = flat(there), flat(here)
    fields = [
        name
        for name in {**there, **here}
        if there.get(name) != here.get(name)
        and not name.startswith(("config.mesh.", "config.data.workers", "config.resolved."))
    ]
    shown = [f"{name} is {there.get(name)} there and {here.get(name)} here" for name in fields[:4]]
    return shown + ([f"and {len(fields) - 4} more"] if len(fields) > 4 else [])


def flat(tree: Any, prefix: str = "config") -> dict[str, Any]:
    """The leaves of a tree of dicts by their names, as "config.optim.lr"."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, node in tree.items()
        for name, value in flat(node, f"{prefix}.{key}").items()
    }
