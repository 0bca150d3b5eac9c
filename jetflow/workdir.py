"""A run's folder: its resolved config, its flow, who trains in it, and what was measured."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

import jax

from jetflow import files, hosts, rollcall
from jetflow.buckets import AnyPath, is_bucket
from jetflow.checkpoint import Checkpoints
from jetflow.fields import differences, shown
from jetflow.flows.build import build
from jetflow.types import Flow, UsageError

CONFIG = "config.json"
SWEEP = "sweep.json"  # in the folder of a sweep
ENVIRONMENT = "environment.json"
LOCK = ".lock"
FORMAT = 1  # of config.json; version 0.1 wrote none
LONGEST_SUFFIX = 120  # letters, of the at most 255 bytes of a file's name
PACKAGES = ("jetflow", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# What the files of a run hold, beside all else; see `files.misfit`.
SHAPE = {
    "format?": int,
    "flow": {"kind": str},
    "data": dict.fromkeys(("name", "train_split", "test_split"), str),
    "noise": dict,
    "train": {"ema_decay": float},
    "eval": {"draws": int},
    "resolved": {
        "image_shape": [int],
        "num_classes": int,
        "total_steps": int,
        "defaults?": dict,
        "standard?": [[float]],
    },
}
ENVIRONMENTS = [
    {"from_step": int, "devices?": str, "images_at_once?": int, "bytes_beside_state?": int}
]
SOURCES = {
    "data?": dict,
    "train_data?": dict,
    "reference?": {"data?": (dict, files.NONE)},
    "network?": {"weights_sha256": str, "published_weights": bool},
}
EVALUATION = SOURCES | {
    "metric": str,
    "step": int,
    "value": files.NUMBER,
    "standard_error?": files.NUMBER,
}
LIKELIHOOD = EVALUATION | {"draws": int, "conditional": bool, "noise": {"kind": str, "std": float}}
LIKELIHOOD |= {"standard_error": files.NUMBER, "data": {"examples": int, str: (str, int)}}

# The fields that may change when a run goes on, and those that may besides if it is extended.
FREE = (
    "train.log_every",
    "train.eval_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.accumulation",
    "flow.attention",
    "flow.scan",
    "mesh",
    "data.workers",
    "resolved.defaults",
)
TOTAL_STEPS = "config.resolved.total_steps"  # which follows from others
LENGTH = ("train.steps", "train.epochs", "train.images", "resolved.total_steps")


def read_flow(workdir: AnyPath, **overrides: Any) -> tuple[dict[str, Any], Flow, str]:
    """The config of a run, its flow, and the field of its checkpoints with the weights to use.

    Args:
        overrides: fields of `config.flow` to change.

    Raises:
        UsageError: there is no run, or `read_config` refuses its config.
    """
    config = read_config(workdir)
    if config is None:
        raise UsageError(
            f"no run in {workdir} (it has no {CONFIG}); "
            f"start one with `jetflow train --config … --workdir {workdir}`"
        )
    resolved, weights = config["resolved"], "ema" if config["train"]["ema_decay"] else "params"
    sizes = {"num_classes": resolved["num_classes"], "image_shape": (*resolved["image_shape"],)}
    sizes["standard"] = resolved.get("standard")
    try:
        return config, build(config["flow"] | overrides, **sizes), weights
    except UsageError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UsageError(f"{workdir / CONFIG} describes no flow ({cause}); restore it") from error


def read_config(workdir: AnyPath) -> dict[str, Any] | None:
    """The resolved config of the run in `workdir`, or None if there is no run.

    The checkpoints hold it too, sealed. That copy decides: it is what the weights were made with.

    Raises:
        UsageError: config.json cannot be read, or differs from the sealed copy in a field that a
            run keeps.
    """
    path = workdir / CONFIG
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        sealed = checkpoints.config()
    if not path.exists():
        return sealed
    try:
        config = files.read_json(path, SHAPE)
    except UsageError as error:
        remedy = ", or delete it: the newest checkpoint has a copy" if sealed else ""
        raise UsageError(f"{error}{remedy}") from error
    if (format := config.pop("format", 0)) > FORMAT:
        raise UsageError(f"{path} has format {format}, newer than {FORMAT}; update jetflow")
    if sealed is None:
        return config
    if differing := differences(sealed, config, FREE + LENGTH):
        raise UsageError(
            f"{path} differs from the copy that is sealed in the checkpoint: {shown(differing)}; "
            "set it back, or delete the file: the copy then counts"
        )
    return sealed


def write_config(workdir: AnyPath, config: dict[str, Any]) -> None:
    """Make `workdir` the folder of a run with this resolved config."""
    files.write_json(workdir / CONFIG, {"format": FORMAT, **config})


@dataclasses.dataclass
class Claim:
    """A workdir in which no other process trains; `begun` once it is the folder of a run."""

    workdir: AnyPath
    begun: bool = False

    def begin(self, config: dict[str, Any], *, extend: bool = False) -> int:
        """Make it the folder of a run with this resolved config; the first process alone.

        Args:
            extend: whether the run may become longer.

        Returns:
            The steps of the run that lives here, or of this one.

        Raises:
            UsageError: another run lives here and has made steps; the message names the fields
                that differ, but for those of `FREE`.
        """
        config = json.loads(json.dumps(config))
        existing = read_config(self.workdir)
        steps, before = (each["resolved"]["total_steps"] for each in (config, existing or config))
        if extend and steps < before:
            raise UsageError(
                f"{self.workdir} holds a run of {before} steps, and config.train asks for {steps}; "
                "--extend only makes a run longer"
            )
        if existing is not None:
            differing = differences(existing, config, FREE + LENGTH if extend else FREE)
            saved = any(self.workdir.glob("checkpoints/*"))
            if differing and (saved or files.read_metrics(self.workdir / files.METRICS)):
                named = {name: both for name, both in differing.items() if name != TOTAL_STEPS}
                raise UsageError(
                    f"{self.workdir} holds a run with another config: "
                    f"{shown(named or differing)}; {_remedy(self.workdir, differing)}"
                )
        write_config(self.workdir, config)
        self.begun = True
        return before


def _remedy(workdir: AnyPath, differing: Iterable[str]) -> str:
    names = {name.removeprefix("config.") for name in differing}
    if {"resolved.total_steps"} < names <= set(LENGTH):
        return "give that length, or --extend to train to the new one"
    if all(name.startswith("resolved.") for name in names):
        return "its data set has changed: prepare the old one again, or give another --workdir"
    return (
        "give that config to go on with it, or another --workdir for a new run, which can "
        f"start from these weights: --config.init_from={workdir}"
    )


@contextlib.contextmanager
def claimed(workdir: AnyPath) -> Iterator[Claim]:
    """Keep other trainings out of `workdir`; one that does not `begin` leaves nothing behind.

    They are kept out while the context lasts: the lock goes with the process, however it ends. Of
    several processes the first one holds it.

    Raises:
        UsageError: a process trains here, or a sweep lives here.
        OSError: the folder cannot be written.
    """
    rollcall.reach(f"the lock of {workdir}")
    claim = Claim(workdir)
    with contextlib.ExitStack() as stack:
        hosts.by_first(lambda: stack.enter_context(_held(claim)))
        yield claim


def check_folder(path: AnyPath) -> None:
    """Raise a UsageError where a file is in the place of a folder: a bucket would take both."""
    if path.is_file():
        raise UsageError(f"{path} is a file; give a folder")


@contextlib.contextmanager
def _held(claim: Claim) -> Iterator[None]:
    workdir = claim.workdir
    check_folder(workdir)
    if (workdir / SWEEP).exists():
        raise UsageError(f"{workdir} holds a sweep; give another --workdir")
    lock = workdir / LOCK
    folders = [] if is_bucket(workdir) else [workdir, *workdir.parents]  # a bucket has none
    made = [path for path in (lock, *folders) if not path.exists()]
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
    with hosts.locked(lock, wait=False) as mine:
        if not mine or not lock.exists():  # one that could not start has just removed it
            raise UsageError(
                f"another process trains in {workdir}; wait for its end, or give another --workdir"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # another process has put something in
                for path in made if folders and not claim.begun else ():
                    path.unlink() if path == lock else path.rmdir()


def result_path(workdir: AnyPath, metric: str, step: int, suffix: str = "") -> AnyPath:
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


def write_result(workdir: AnyPath, result: dict[str, Any], suffix: str = "") -> AnyPath:
    """Write the result of an evaluation, which has a metric and a step."""
    path = result_path(workdir, result["metric"], result["step"], suffix)
    files.write_json(path, result)
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


def note_environment(workdir: AnyPath, step: int, **facts: Any) -> None:
    """Add this environment to those of a run, from `step` on, unless it is the last one of them.

    Args:
        facts: of the run, which may change from some step on: its length, its attention.
    """
    current, path = environment() | facts, workdir / ENVIRONMENT
    known = files.read_or_set_aside(path, ENVIRONMENTS, [])
    if not known or not current.items() <= known[-1].items():
        files.write_json(path, [*known, {"from_step": step, **current}])


def note_memory(workdir: AnyPath, **facts: int) -> None:
    """Add what a step takes to the last of the environments of a run."""
    path = workdir / ENVIRONMENT
    known = files.read_or_set_aside(path, ENVIRONMENTS, [])
    if known and not facts.items() <= known[-1].items():
        files.write_json(path, [*known[:-1], known[-1] | facts])


def scan_environments(workdir: AnyPath) -> tuple[list[dict[str, Any]], list[str]]:
    """The environments of a run, in the order of its steps, and what is wrong with their file."""
    known, wrong = files.scan_json(workdir.glob(ENVIRONMENT), ENVIRONMENTS)
    return [*itertools.chain.from_iterable(known)], wrong
