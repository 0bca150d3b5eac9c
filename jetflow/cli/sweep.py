"""`jetflow sweep`: training, sampling and evaluation over a grid of settings."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

from jetflow import hosts, signals
from jetflow.buckets import AnyPath
from jetflow.cli.flags import Command
from jetflow.options import DataOptions, option, spelled
from jetflow.sweeps import read
from jetflow.tools.report.document import columns
from jetflow.tools.report.sweep_page import sweep_page
from jetflow.tools.sweep import runner
from jetflow.tools.sweep.store import Store
from jetflow.types import UsageError

FAILED = 1  # an exit status: the same command tries the points that failed again


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(DataOptions, hosts.ProcessOptions):
    """The options of `jetflow sweep`."""

    sweep: str = option(help="the sweep's file", example="configs/sweeps/NAME.py")
    workdir: AnyPath = option(
        help="the folder of the sweep; the same command goes on", example="runs/NAME"
    )
    run: AnyPath | None = option(
        None,
        "the workdir of a trained run to measure; default: the sweep's config is trained in the "
        "sweep's folder",
    )
    fix: Mapping | None = option(
        None,
        "NAME=VALUE: a setting of all points, in place of the sweep's; a field of the config or an "
        "option of `evaluate`; may be given again",
    )
    shard: str | None = option(
        None,
        "I/N: measure every N-th point from the I-th on, counted from 0; processes that share the "
        "folder never do a point twice",
    )
    point: int | None = option(None, "measure the point of this number alone")
    print: bool = option(False, "print a command for each point, and measure none")


def run(options: SweepOptions) -> int:
    """The exit status is 0, `FAILED`, or 128 + the number of the signal that stopped a training."""
    names = {field.name for field in dataclasses.fields(hosts.ProcessOptions)}
    arguments = {name: value for name, value in vars(options).items() if name not in names}
    arguments |= {"fix": _typed(options.fix or {}), "shard": _shard(options.shard)}
    sweep = read(options.sweep).with_fixed(arguments["fix"])
    points = sweep.chosen(arguments["shard"], options.point)
    if arguments.pop("print"):
        runner.Runner(sweep, Store(options.workdir), options.run).check()
        for point in points:
            print(shlex.join(_command(options, point.number)))
        return 0
    try:
        records = runner.sweep(**arguments)
    except signals.Stopped as stopped:
        hosts.note("the sweep stopped: run the same command again to go on")
        return 128 + stopped.signal
    if hosts.is_first():
        print(columns(**sweep_page(options.workdir)["table"]))
        print(f"the page: {options.workdir}/report.html")
    status = {record["number"]: record["status"] for record in records}
    if elsewhere := sum(point.number not in status for point in points):
        hosts.note(f"other processes are at {elsewhere} points: "
                    f"`jetflow report {options.workdir}` when done")  # fmt: skip
    if failed := sum(status.get(point.number) == "failed" for point in points):
        hosts.note(f"failed: {failed} of {len(points)} points; the same command tries them again")
    return FAILED if failed else 0


def _typed(fix: Mapping[str, str]) -> dict[str, Any]:
    """The values that --fix spells; fields of a config stay texts until they are set."""
    known = {field.name for field in dataclasses.fields(runner.PointOptions)}
    return {
        name: spelled(runner.PointOptions, name, text) if name in known else text
        for name, text in fix.items()
    }


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not (match := re.fullmatch(r"([0-9]+)/([0-9]+)", text)):
        raise UsageError(f"--shard is {text!r}; expected I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def _command(options: SweepOptions, number: int) -> list[str]:
    """The command line that measures one point."""
    names = ("sweep", "workdir", "run", "data_dir", "data_cache", "data_cache_gb")
    given = [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]
    fix = [f"--fix={name}={text}" for name, text in (options.fix or {}).items()]
    return ["jetflow", "sweep", *given, *fix, f"--point={number}"]


COMMAND = Command(
    "jetflow sweep --sweep configs/sweeps/guidance.py --workdir runs/guidance", SweepOptions, run
)
