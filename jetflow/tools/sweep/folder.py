"""The folder of a sweep: what is measured, what was found at each point, and who is at which."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetflow import hosts
from jetflow.files import write_json
from jetflow.sweeps import Point
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, SWEEP, flat

NO_PART = ("points", "title", "description", "repeats")  # of what is compared field by field
MOST_SHOWN = 4  # fields that differ


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a sweep leaves: `sweep.json`, and each point's record and picture in `points/`."""

    path: Path

    def open(self, content: dict[str, Any]) -> None:
        """Make it the folder of this sweep; one with more points than before may go on in it.

        Raises:
            UsageError: if it holds another one, or cannot be written.
        """
        there = self.content() if (self.path / SWEEP).exists() else content
        if there["run"] != content["run"]:
            what = f"with --run {there['run']}" if there["run"] else "without --run"
            raise UsageError(
                f"the sweep in {self.path} was begun {what}; go on so, or give another --workdir"
            )
        if differing := _differences(there, content):
            raise UsageError(
                f"{self.path} holds another sweep: {'; '.join(differing)}; give another --workdir, "
                "or delete that one"
            )
        try:
            write_json(self.path / SWEEP, content)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def check(self) -> None:
        """Raise a UsageError if it is the folder of a run."""
        if (self.path / CONFIG).exists():
            raise UsageError(f"{self.path} holds a run; give the sweep a --workdir of its own")

    def content(self) -> dict[str, Any]:
        """Of the sweep that lives there.

        Raises:
            UsageError: if there is none.
        """
        path = self.path / SWEEP
        if not path.exists():
            raise UsageError(f"no sweep in {self.path}; start one with `jetflow sweep`")
        return json.loads(path.read_text())

    def step(self, run: str | None) -> int | None:
        """The checkpoint of a given run that the points are measured at, once that is known."""
        there = self.content() if (self.path / SWEEP).exists() else {}
        step = there.get("fixed", {}).get("step") if there.get("run") == run else None
        return None if step is None else int(step)

    def record_path(self, point: Point) -> Path:
        return self.path / "points" / f"{point.name}.json"

    def is_done(self, point: Point) -> bool:
        """Whether it was measured; a failed point is to be tried again."""
        path = self.record_path(point)
        return path.exists() and json.loads(path.read_text())["status"] == "done"

    def records(self) -> list[dict[str, Any]]:
        """Of all points that were measured or failed, by their numbers."""
        found = [json.loads(path.read_text()) for path in (self.path / "points").glob("*.json")]
        return sorted(found, key=lambda record: record["number"])

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether this process has a lock of the sweep, as `hosts.locked` gives it."""
        if not hosts.is_first():
            yield hosts.agreed(False)
            return
        folder = self.path / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with hosts.locked(folder / name, wait=wait) as mine:
            yield hosts.agreed(mine)


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--workdir {path} cannot be written ({error}); give a folder that can")


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What sets two sweeps apart, the first fields only; new points may come after the others."""
    known, new = there["points"], here["points"]
    there, here = (
        flat({name: value for name, value in one.items() if name not in NO_PART}, "sweep")
        for one in (there, here)
    )
    fields = [
        name
        for name in {**there, **here}
        if str(there.get(name)) != str(here.get(name))  # --fix gives text
        and not name.startswith(("sweep.recipe.mesh.", "sweep.recipe.data.workers"))
    ]
    shown = [
        f"{name.removeprefix('sweep.')} is {there.get(name)} there and {here.get(name)} here"
        for name in fields[:MOST_SHOWN]
    ]
    more = [f"and {len(fields) - MOST_SHOWN} more"] if len(fields) > MOST_SHOWN else []
    others = ["its points are others, or in another order (new ones go last)"]
    return shown + more + (others if new[: len(known)] != known else [])
