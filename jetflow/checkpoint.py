"""Checkpoints that notice damage: Orbax for the bytes, a checksum per array for the truth.

Orbax writes a step atomically and restores it onto any sharding, but hands back an array with a
flipped bit in silence. So a step is two items: `state`, a flat dict from the path of an array
("params/dense/kernel") to the array, and `record`, a JSON file with the config and, of each array,
its type, shape and checksum, sealed by a digest. No tree types are stored: code that knows nothing
of the optimizer can restore the params.
"""

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from logging import getLogger
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import Array, Bool, Shaped
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jetflow import checksums, hosts, rollcall
from jetflow.buckets import as_path, is_bucket, raise_refusal
from jetflow.fields import differences, shown
from jetflow.files import listed, naming
from jetflow.types import AnyArray, UsageError

T = TypeVar("T")

WEIGHTS = ("params", "ema")  # the fields of a state that must be finite


class Damage(Exception):
    """A checkpoint is not what was saved; the message names the cause."""


class NotFinite(Exception):
    """The parameters of a state are not finite, so it was not saved."""


class Checkpoints:
    """The checkpoints under one directory, saved in the background; a context manager.

    Only `save` creates or deletes anything, so `sample` and `evaluate` may read the directory of a
    run in progress. All processes must make the same calls. The end of the context waits for the
    save in progress, and raises if it failed.

    Args:
        directory: a local path or a bucket URL, shared by all processes.
        keep: how many of the newest steps to keep.
        keep_every: keep the multiples of this many steps too, for good.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep: int = 3, keep_every: int | None = None
    ):
        path = os.fspath(as_path(directory))
        self.directory = epath.Path(path if is_bucket(path) else os.path.abspath(path))
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self._policy = policies.AnyPreservationPolicy(kept)
        self._manager: ocp.CheckpointManager | None = None  # which would create the directory
        self._sound: dict[int, dict] = {}  # step -> arrays, as this object wrote or verified them
        self._damaged: set[int] = set()
        _hush_orbax()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        if self._manager is not None:
            self._guarded(self._manager.close)
            self._manager = None

    def wait(self) -> None:
        """Wait until the save in progress is on disk.

        Raises:
            OSError: it failed; the checkpoints before it are as they were.
        """
        if self._manager is not None:
            self._guarded(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raise as `wait` does if the save has failed, but do not wait for it.

        Several processes find out at the next save, at which they wait for each other.
        """
        if self._manager and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def _guarded(self, save: Callable[[], Any]) -> None:
        """A save that fails is over: Orbax would raise again when its manager is closed."""
        try:
            with naming(self.directory):
                save()
        except Exception:
            self._manager = None
            raise

    def steps(self) -> list[int]:
        """The steps on disk, oldest first; a save that was cut short is not among them."""
        paths = [path for path in listed(self.directory) if path.name.isdigit()]
        if is_bucket(self.directory):  # where Orbax would take an error for a save cut short
            paths = [path for path in paths if (path / "commit_success.txt").exists()]
        return sorted(int(path.name) for path in paths)

    def latest(self) -> int | None:
        """The newest step on disk (its arrays unverified), or None."""
        return max(self.steps(), default=None)

    def config(self) -> dict[str, Any] | None:
        """The config in the newest sound record; None where there is none."""
        for step in reversed(self.steps()):
            try:
                return _read_record(self.directory / str(step) / "record")["config"] or None
            except Exception as error:  # as in `_everywhere`
                raise_refusal(error)
        return None

    def save(self, step: int, state: Any, config: dict) -> None:
        """Copy `state` to the host and write it in the background.

        `state` may be donated as soon as this returns: on an accelerator the copy is complete by
        then; on the CPU it is a view, and XLA does not reuse a buffer while there is a view of it.

        A step that this object wrote or verified with the same arrays is left alone; any other one
        of this step is replaced. Steps that `restore` found damaged are deleted for good.

        Args:
            step: the name of the checkpoint.
            state: a dataclass or dict of fields, each any pytree of `jax.Array`s.
            config: of the run, which `config` gives back; anything that JSON can hold.

        Raises:
            NotFinite: there are parameters, or averages of them, that are not finite.
            OSError: it cannot be written, or the one before could not.
        """
        arrays = checksums.flatten(state)
        if not _are_finite([arrays[path] for path in arrays if path.split("/")[0] in WEIGHTS]):
            raise NotFinite("the parameters are not finite")
        content = {"config": config, "arrays": checksums.describe(arrays)}
        record = checksums.seal(json.loads(json.dumps(content)))
        self.wait()
        self._guarded(lambda: self._replace(step, arrays, record))
        self._sound[step] = record["arrays"]

    def _replace(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        self._manager = self._manager or ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                save_root_metadata=False,
            ),
        )
        for damaged in self._damaged.intersection(self._manager.all_steps()):
            self._manager.delete(damaged)
        self._damaged.clear()
        if step in self._manager.all_steps():
            if self._sound.get(step) == record["arrays"]:
                return
            self._manager.delete(step)
        items = {"state": ocp.args.PyTreeSave(arrays), "record": ocp.args.JsonSave(record)}
        # Without force, Orbax skips a step older than the newest one in silence.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, int]:
        """Read the newest sound checkpoint, or the one of `step`.

        A damaged checkpoint is logged as a warning and the one before it is tried, unless `step`
        was asked for.

        Args:
            abstract_state: a dataclass or dict of the wanted fields, pytrees of
                `jax.ShapeDtypeStruct`s (or arrays) whose shardings the result takes; without one,
                the first local device. A field must hold exactly what it held when it was saved.
                Other fields are not read: `{"params": …}` is enough.
            step: the step to read, and no other.

        Returns:
            A pytree like `abstract_state`, and the step that it comes from.

        Raises:
            UsageError: there is no checkpoint, or none that is sound, or it does not fit.
        """
        self.wait()
        steps = hosts.agreed(self.steps())
        if not steps:
            raise UsageError(
                f"no checkpoint in {self.directory}; train first with "
                f"`jetflow train --config … --workdir {self.directory.parent}`"
            )
        if step is not None and step not in steps:
            raise UsageError(f"no checkpoint of step {step} in {self.directory}; it has {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            hosts.wait_to_see(self.directory / str(candidate))
            try:
                return self._restore(candidate, abstract_state), candidate
            except Damage as damage:
                self._damaged.add(candidate)
                message = f"checkpoint {candidate} in {self.directory} is damaged: {damage}"
                if step is not None:
                    others = [other for other in steps if other != step]
                    raise UsageError(f"{message}; other steps there: {others}") from damage
                logging.warning("%s; trying the one before it", message)
        raise UsageError(
            f"every checkpoint in {self.directory} is damaged (steps {steps}; the warnings above "
            "say how); restore a copy of one, or train anew in another --workdir"
        )

    def _restore(self, step: int, abstract_state: Any) -> Any:
        directory = self.directory / str(step)
        record = _everywhere(lambda: _read_record(directory / "record"))
        wanted = checksums.flatten(abstract_state)
        fields = abstract_state if isinstance(abstract_state, dict) else vars(abstract_state)
        entries = record["arrays"].items()
        stored = {path: entry for path, entry in entries if path.split("/")[0] in fields}
        kinds = {path: kind for path, (kind, _) in stored.items()}
        saved = {p: checksums.as_recorded(p, leaf, kinds.get(p)) for p, leaf in wanted.items()}
        if differing := differences(kinds, checksums.types(saved), prefix=""):
            raise UsageError(
                f"checkpoint {step} in {self.directory} does not fit this config: "
                f"{shown(differing)}; use the config of that run, or another --workdir"
            )
        arrays = _everywhere(lambda: _read_arrays(directory / "state", saved))
        for path, entry in checksums.describe(arrays).items():
            if entry != stored[path]:
                raise Damage(f"the checksum of {path} is {entry[1]}, not {stored[path][1]}")
        if len(arrays) == len(record["arrays"]):
            self._sound[step] = record["arrays"]
        leaves = [checksums.as_wanted(arrays[path], leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


@jax.jit
def _are_finite(arrays: list[Shaped[AnyArray, "..."]]) -> Bool[Array, ""]:
    return jnp.array([jnp.isfinite(array).all() for array in arrays]).all()


def _read_record(directory: epath.Path) -> dict:
    record = json.loads((directory / "metadata").read_text())
    if record != checksums.seal({"config": record["config"], "arrays": record["arrays"]}):
        raise Damage("its record does not match the record's digest")
    return record


def _read_arrays(directory: epath.Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """Restore the wanted paths onto their shardings; each process reads its own shards.

    `CheckpointManager.restore` ends in a barrier, at which the other processes would wait for ever
    for one that cannot read its shards; its handler does not.
    """
    if not wanted:
        return {}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {path: getattr(leaf, "sharding", None) or default for path, leaf in wanted.items()}
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in wanted.items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
    restored = ocp.PyTreeCheckpointHandler().restore(directory, args=args)
    return {path: restored[path] for path in wanted}


def _everywhere(read: Callable[[], T]) -> T:
    """`read()` on this process; if it fails on any process, raises Damage on all of them.

    Orbax, TensorStore and JSON raise many types for a damaged file: any counts but want of memory.
    """
    result, cause = None, None
    rollcall.reach("reading a checkpoint")
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise_refusal(error)  # which says nothing of what is stored
        cause = _explain(error)
    failed = hosts.failing(cause is not None)
    if failed is not None and cause is None:
        cause = f"not readable on process {failed}"
    if cause:
        raise Damage(cause)
    return result  # type: ignore[return-value]


@functools.cache  # once
def _hush_orbax() -> None:
    """Keep Orbax off the terminal: its progress, and the errors that it raises besides.

    It reads and writes all arrays at once, and raises the first failure. Of the others TensorStore
    tells a loop that is closed, and asyncio prints pages when it collects their tasks.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        is_late = "Event loop is closed" in str(unraisable.exc_value)
        if not (is_late or inspect.iscoroutine(unraisable.object)):
            before(unraisable)

    sys.unraisablehook = hook
    for logger in (logging.get_absl_logger(), getLogger("asyncio")):
        logger.addFilter(lambda line: not re.search("/(orbax|asyncio)/", line.pathname))


def _explain(error: BaseException) -> str:
    """One line on the first cause, without TensorStore's specs."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:240]
    return text if isinstance(error, Damage) else f"{type(error).__name__}: {text}"
