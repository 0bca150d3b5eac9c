"""A run's folder: its resolved config, its flow, who trains in it, and what was measured."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from jetflow import hosts
from jetflow.checkpoint import Checkpoints
from jetflow.files import METRICS, read_json, read_metrics, write_json
from jetflow.flows.build import build
from jetflow.types import Flow, UsageError

CONFIG = "config.json"
SWEEP = "sweep.json"  # in the folder of a sweep
ENVIRONMENT = "environment.json"
LOCK = ".lock"
FORMAT = 1  # of config.json; version 0.1 wrote none
LONGEST_SUFFIX = 120  # letters, of the at most 255 bytes of a file's name
MOST_SHOWN = 4  # fields that differ
PACKAGES = ("jetflow", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# The fields that may change when a run goes on, and those that may besides if it is extended.
FREE = (
    "config.train.log_every",
    "config.train.eval_every",
    "config.train.sample_every",
    "config.train.checkpoint_every",
    "config.train.keep_checkpoints",
    "config.train.keep_every",
    "config.flow.attention",
    "config.mesh",
    "config.data.workers",
    "config.resolved.defaults",
)
LENGTH = ("config.train.steps", "config.train.epochs", "config.train.images")
LENGTH += ("config.resolved.total_steps",)
LATER = {"config.flow.precision": "default"}  # fields that older runs do not have, and their value


def read_flow(workdir: Path, **overrides: Any) -> tuple[dict[str, Any], Flow, str]:
    """The config of a run, its flow, and the field of its checkpoints with the weights to use.

    Args:
        overrides: fields of `config.flow` to change.

    Raises:
        UsageError: there is no run, or its config is incomplete.
    """
    config = read_config(workdir)
    if config is None:
        raise UsageError(
            f"no run in {workdir} (it has no {CONFIG}); "
            f"start one with `jetflow train --config … --workdir {workdir}`"
        )
    try:
        resolved, section, decay = config["resolved"], config["flow"], config["train"]["ema_decay"]
        sizes = {"num_classes": resolved["num_classes"], "image_shape": (*resolved["image_shape"],)}
    except (KeyError, TypeError) as error:
        raise UsageError(f"{workdir / CONFIG} is incomplete ({error!r}); restore it") from error
    return config, build(section | overrides, **sizes), "ema" if decay else "params"


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The resolved config of the run in `workdir`, or None if there is no run."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    config = read_json(path)
    if (format := config.pop("format", 0)) > FORMAT:
        raise UsageError(f"{path} has format {format}, newer than {FORMAT}; update jetflow")
    return config


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Make `workdir` the folder of a run with this resolved config."""
    write_json(workdir / CONFIG, {"format": FORMAT, **config})


@dataclasses.dataclass
class Claim:
    """A workdir in which no other process trains; `begun` once it is the folder of a run."""

    workdir: Path
    begun: bool = False

    def begin(self, config: dict[str, Any], *, extend: bool = False) -> None:
        """Make it the folder of a run with this resolved config.

        Args:
            extend: whether the length of the run may change.

        Raises:
            UsageError: another run lives here and has made steps; the message names the fields
                that differ, but for those of `FREE`.
        """
        if not hosts.is_first():
            return
        config = json.loads(json.dumps(config))
        existing = read_config(self.workdir)
        if existing is not None:
            differing = differences(existing, config, FREE + LENGTH if extend else FREE)
            if differing and self._has_steps():
                raise UsageError(
                    f"{self.workdir} holds a run with another config: {shown(differing)}; "
                    + _remedy(self.workdir, set(differing))
                )
        if existing != config:
            write_config(self.workdir, config)
        self.begun = True

    def _has_steps(self) -> bool:
        with Checkpoints(self.workdir / "checkpoints") as checkpoints:
            return bool(checkpoints.steps() or read_metrics(self.workdir / METRICS))


def _remedy(workdir: Path, names: set[str]) -> str:
    if {"config.resolved.total_steps"} < names <= set(LENGTH):
        return "give that length, or --extend to train to the new one"
    if all(name.startswith("config.resolved.") for name in names):
        return "its data set has changed: prepare the old one again, or give another --workdir"
    return (
        "give that config to go on with it, or another --workdir for a new run, which can "
        f"start from these weights: --config.init_from={workdir}"
    )


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[Claim]:
    """Keep other trainings out of `workdir`; one that does not `begin` leaves nothing behind.

    They are kept out while the context lasts: the lock goes with the process, however it ends. Of
    several processes the first one holds it.

    Raises:
        UsageError: a process trains here, a sweep lives here, or the folder cannot be written.
    """
    claim = Claim(workdir)
    if not hosts.is_first():
        yield claim
        return
    if (workdir / SWEEP).exists():
        raise UsageError(f"{workdir} holds a sweep; give another --workdir")
    lock = workdir / LOCK
    made = [path for path in (lock, workdir, *workdir.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            mine = stack.enter_context(hosts.locked(lock, wait=False))
        except OSError as error:
            raise UsageError(
                f"--workdir {workdir} cannot be written ({error}); give a folder that can"
            ) from error
        if not mine or not lock.exists():  # one that could not start has just removed it
            raise UsageError(
                f"another process trains in {workdir}; wait for its end, or give another --workdir"
            )
        try:
            yield claim
        finally:
            with contextlib.suppress(OSError):  # another process has put something in
                for path in [] if claim.begun else made:
                    path.unlink() if path == lock else path.rmdir()


def result_path(workdir: Path, metric: str, step: int, suffix: str = "") -> Path:
    """The file of a metric's value at a step."""
    return workdir / "evals" / f"{metric}-{step:08d}{suffix}.json"


def suffix(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The part of a result's file name that tells its settings: "-seed=1,split=train".

    Settings that equal their defaults are left out. A long list is cut, and its hash added.
    """
    changed = {name: value for name, value in settings.items() if value != defaults.get(name)}
    text = ",".join(f"{name}={quote(str(changed[name]), safe='')}" for name in sorted(changed))
    if len(text) > LONGEST_SUFFIX:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = f"{text[:LONGEST_SUFFIX]}-{digest}"
    return f"-{text}" if text else ""


def write_result(workdir: Path, result: dict[str, Any], suffix: str = "") -> Path:
    """Write the result of an evaluation, which has a metric and a step."""
    path = result_path(workdir, result["metric"], result["step"], suffix)
    write_json(path, result)
    return path


def environment() -> dict[str, Any]:
    """What this process and its fellows compute with: versions, devices, processes."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def note_environment(workdir: Path, step: int, **facts: Any) -> None:
    """Add this environment to those of a run, from `step` on, unless it is the last one of them.

    Args:
        facts: of the run, which may change from some step on: its length, its attention.
    """
    current = environment() | facts
    known = read_environments(workdir)
    if not known or {**known[-1], "from_step": None} != {"from_step": None, **current}:
        write_json(workdir / ENVIRONMENT, [*known, {"from_step": step, **current}])


def read_environments(workdir: Path) -> list[dict[str, Any]]:
    """The environments of a run, in the order of its steps; [] where none was noted."""
    path = workdir / ENVIRONMENT
    return read_json(path, list) if path.exists() else []


def differences(
    old: dict[str, Any], new: dict[str, Any], free: Sequence[str] = FREE, root: str = "config"
) -> dict[str, tuple[Any, Any]]:
    """The fields of two trees that differ, with both values, except `free` ones and those below.

    What the data resolved to counts only where the old tree has it: version 0.1 recorded less.
    """
    old, new = LATER | flat(old, root), LATER | flat(new, root)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
        and not any(f"{name}.".startswith(f"{field}.") for field in free)
        and (name in old or not name.startswith(f"{root}.resolved."))
    }


def shown(differing: dict[str, tuple[Any, Any]]) -> str:
    """Differences for a person: the first ones, and the number of the others."""
    texts = [f"{name} is {old} there and {new} here" for name, (old, new) in differing.items()]
    more = [f"and {len(texts) - MOST_SHOWN} more"] if len(texts) > MOST_SHOWN else []
    return ", ".join(texts[:MOST_SHOWN] + more)


def flat(tree: Any, prefix: str = "config") -> dict[str, Any]:
    """The leaves of a tree of dicts by their names, such as "config.optim.lr"."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves = [flat(node, f"{prefix}.{key}") for key, node in tree.items()]
    return {name: value for branch in leaves for name, value in branch.items()}
