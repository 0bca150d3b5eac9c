"""The folder of a sweep: its content, the records of its points, and locks."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jetflow import hosts
from jetflow.buckets import AnyPath
from jetflow.fields import differences, shown
from jetflow.files import NONE, NUMBER, listed, read_json, read_or_set_aside, scan_json, write_json
from jetflow.sweeps import Point
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, SOURCES, SWEEP, check_folder

# Not compared when a sweep goes on; points are compared apart, as new ones may come last.
FREE = ("title", "description", "repeats", "points")
FREE += ("recipe.mesh", "recipe.data.workers", "recipe.flow.attention")

TEXT = (str, NONE)
CONTENT = {"title": str, "description": str, "fixed": dict, "config": TEXT, "run": TEXT}
CONTENT |= {"metrics": [str], "repeats": [str], "points": [{str: {"label": str}}]}
RECORD = {"number": int, "name": str, "status": str, "seconds": float, "environment": dict}
RECORD |= {"error?": str, "workdir?": str, "results?": [SOURCES]}
RECORD |= {"metrics?": {str: NUMBER}, "errors?": {str: NUMBER}}


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder: `sweep.json`, and each point's record and picture in `points/`."""

    path: AnyPath

    def begin(self, content: dict[str, Any]) -> None:
        """Make it the folder of this sweep, or go on with it.

        Raises:
            UsageError: if it holds another sweep.
        """
        old = self.content() if (self.path / SWEEP).exists() else content
        if old["run"] != content["run"]:
            begun = f"with --run {old['run']}" if old["run"] else "without --run"
            raise UsageError(
                f"the sweep in {self.path} was begun {begun}; go on so, or give another --workdir"
            )
        differing = differences(old, content, FREE, "sweep.")
        texts = [shown(differing)] if differing else []
        if content["points"][: len(old["points"])] != old["points"]:
            texts.append("its points are others, or in another order (new ones go last)")
        if texts:
            raise UsageError(
                f"{self.path} holds another sweep: {'; '.join(texts)}; give another --workdir, or "
                "delete that one"
            )
        write_json(self.path / SWEEP, content)

    def content(self) -> dict[str, Any]:
        """The content of the sweep.

        Raises:
            UsageError: if the folder holds none, or its file cannot be read.
        """
        if not (self.path / SWEEP).exists():
            raise UsageError(f"no sweep in {self.path}; start one with `jetflow sweep`")
        return read_json(self.path / SWEEP, CONTENT)

    def step(self, run: str | None) -> int | None:
        """The checkpoint of the run that the points are measured at, once that is known."""
        if run is None or not (self.path / SWEEP).exists():
            return None
        content = self.content()
        return content["fixed"].get("step") if content["run"] == run else None

    def record_path(self, point: Point) -> AnyPath:
        return self.path / "points" / f"{point.name}.json"

    def is_done(self, point: Point) -> bool:
        """Whether it was measured; a failed point is to be tried again, and so is one whose record
        cannot be read."""
        record = read_or_set_aside(self.record_path(point), RECORD, None)
        return record is not None and record["status"] == "done"

    def records(self) -> list[dict[str, Any]]:
        """The records of all points that were measured or failed, by their numbers."""
        return self.scan()[0]

    def scan(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records that can be read, and what is wrong with the others."""
        records, wrong = scan_json(
            [path for path in listed(self.path / "points") if path.suffix == ".json"], RECORD
        )
        return sorted(records, key=lambda record: record["number"]), wrong

    def _check(self) -> None:
        check_folder(self.path)
        if (self.path / CONFIG).exists():
            raise UsageError(f"{self.path} holds a run; give the sweep a --workdir of its own")
        (self.path / "locks").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether this process has a lock of the sweep, as `hosts.locked` gives it.

        Raises:
            UsageError: if the folder is that of a run.
            OSError: if it cannot be written.
        """
        hosts.by_first(self._check)
        if not hosts.is_first():
            yield hosts.agreed(False)
            return
        with hosts.locked(self.path / "locks" / name, wait=wait) as mine:
            yield hosts.agreed(mine)
