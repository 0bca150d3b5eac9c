"""A run's folder: its resolved config, its flow, and the results of evaluations."""

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
PACKAGES = ("jetflow", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Fields of the config that may change when a run goes on, and those that `extend` frees besides.
FREE = (
    "config.train.log_every",
    "config.train.eval_every",
    "config.train.sample_every",
    "config.train.checkpoint_every",
    "config.train.keep_checkpoints",
    "config.train.keep_every",
    "config.mesh",
    "config.data.workers",
)
LENGTH = (
    "config.train.steps",
    "config.train.epochs",
    "config.train.images",
    "config.resolved.total_steps",
)


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
    """The resolved config of the run in `workdir`, or None if there is no run."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    config = read_json(path)
    if (format := config.pop("format", 0)) > FORMAT:
        raise UsageError(
            f"{path} has format {format}, but this jetflow knows formats up to {FORMAT}; update it"
        )
    return config


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Make `workdir` the folder of a run with this resolved config."""
    write_json(workdir / CONFIG, {"format": FORMAT, **config})


@dataclasses.dataclass
class Claim:
    """A workdir in which no other process trains, as `claimed` gives it."""

    workdir: Path
    begun: bool = False

    def begin(self, config: dict[str, Any], *, extend: bool = False) -> None:
        """Make it the folder of a run with this resolved config.

        Args:
            extend: whether the length of the run may change.

        Raises:
            UsageError: another run lives here, and has made steps; the message names the fields
                that differ. Those of `FREE` may.
        """
        if not hosts.is_first():
            return
        config = json.loads(json.dumps(config))
        existing = read_config(self.workdir)
        free = FREE + LENGTH if extend else FREE
        differing = {} if existing is None else differences(existing, config, free)
        if differing and _has_begun(self.workdir):
            raise UsageError(
                f"{self.workdir} holds a run with another config: {shown(differing)}; "
                + _remedy(self.workdir, differing)
            )
        if existing != config:
            write_config(self.workdir, config)
        self.begun = True


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[Claim]:
    """Keep other trainings out of `workdir`; one that does not `begin` leaves nothing behind.

    They are out while the context lasts: the lock goes with the process, however it ends. Of
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
            if not claim.begun:
                _remove(made)


def _remove(paths: list[Path]) -> None:
    """Remove a file and the empty folders around it."""
    with contextlib.suppress(OSError):  # another process has put something in
        for path in paths:
            path.unlink() if path.name == LOCK else path.rmdir()


def _remedy(workdir: Path, differing: dict[str, Any]) -> str:
    if differing.keys() <= set(LENGTH) and any(name in differing for name in LENGTH[:3]):
        return "give that length to go on with it, or --extend for the new one"
    if all(name.startswith("config.resolved.") for name in differing):
        return (
            "its data set has changed since; prepare that of the run again, or give another "
            "--workdir for a new run"
        )
    return (
        "give that config to go on with it, or another --workdir for a new run, which can "
        f"start from these weights: --config.init_from={workdir}"
    )


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
    return read_json(result_path(workdir, metric, step))


def environment() -> dict[str, Any]:
    """What this process and its fellows compute with: versions, devices, processes."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def note_environment(workdir: Path, step: int) -> None:
    """Add this environment to those of a run, from `step` on, unless it is the last one of them."""
    current, known = environment(), read_environments(workdir)
    if not known or {**known[-1], "from_step": None} != {"from_step": None, **current}:
        write_json(workdir / ENVIRONMENT, [*known, {"from_step": step, **current}])


def read_environments(workdir: Path) -> list[dict[str, Any]]:
    """The environments of a run, in the order of its steps; [] where none was noted."""
    path = workdir / ENVIRONMENT
    return read_json(path, list) if path.exists() else []


def _has_begun(workdir: Path) -> bool:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return bool(checkpoints.steps()) or bool(read_metrics(workdir / METRICS))


def differences(
    old: dict[str, Any], new: dict[str, Any], free: Sequence[str] = FREE, root: str = "config"
) -> dict[str, tuple[Any, Any]]:
    """The fields of two trees that differ, with both values, except `free` ones and those below.

    What the data resolved to counts only as far as the old tree noted it: version 0.1 noted less.
    """
    old, new = flat(old, root), flat(new, root)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
        and not any(name == field or name.startswith(f"{field}.") for field in free)
        and (name in old or not name.startswith(f"{root}.resolved."))
    }


def shown(differing: dict[str, tuple[Any, Any]], most: int = 4) -> str:
    """Differences for a person: the first ones, and the number of the others."""
    texts = [f"{name} is {old} there and {new} here" for name, (old, new) in differing.items()]
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return ", ".join(texts[:most] + more)


def flat(tree: Any, prefix: str = "config") -> dict[str, Any]:
    """The leaves of a tree of dicts by their names, as "config.optim.lr"."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, node in tree.items()
        for name, value in flat(node, f"{prefix}.{key}").items()
    }
