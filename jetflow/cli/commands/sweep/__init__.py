"""`jetflow sweep`: training, sampling and evaluation over a grid of settings."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jetflow import hosts, sweeps
from jetflow.cli import commands
from jetflow.cli.commands.sweep.point import Runner, Stopped
from jetflow.sweeps import Point, Sweep, say
from jetflow.tools.report.document import columns, report
from jetflow.tools.report.sweep_page import sweep_page
from jetflow.tools.sweep.folder import Folder
from jetflow.types import UsageError
from jetflow.workdir import SWEEP, read_flow

USAGE = "jetflow sweep --sweep configs/sweeps/guidance.py --workdir runs/guidance"
ARGUMENTS = ()
FAILED = 1  # an exit status: the same command tries the points that failed again


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "sweep", None, "the sweep's file, such as configs/sweeps/NAME.py")
    flag(flags.DEFINE_string, "workdir", None, "the folder of the sweep; the same command goes on")
    flag(flags.DEFINE_string, "run", None, "the workdir of a trained run to measure; default: what "
         "the sweep's config says is trained in the sweep's folder")  # fmt: skip
    flag(flags.DEFINE_multi_string, "fix", [], "NAME=VALUE: a setting of all points, in place of "
         "the sweep's; a field of the config or a flag of `evaluate` or `sample`")  # fmt: skip
    flag(flags.DEFINE_string, "shard", None, "I/N: measure every N-th point from the I-th on, "
         "counted from 0; processes that share the folder never do a point twice")  # fmt: skip
    flag(flags.DEFINE_integer, "point", None, "measure the point of this number alone")
    flag(flags.DEFINE_bool, "print", False, "print a command for each point, and measure none")
    commands.define_data_dir(values)


def run(values: flags.FlagValues) -> int:
    path = commands.required(values, "sweep", "configs/sweeps/NAME.py")
    folder = Folder(Path(commands.required(values, "workdir", "runs/NAME")))
    folder.check()
    sweep = _fixed(sweeps.read(path), values.fix)
    chosen = _chosen(sweep, values)
    run_dir = None if values.run is None else str(Path(values.run).resolve())
    if run_dir:
        read_flow(Path(run_dir))  # which raises where there is none
    runner = Runner(sweep, folder, run=run_dir, data_dir=values.data_dir)
    runner.check(on_this_machine=not values.print)
    if values.print:
        for point in chosen:
            print(shlex.join(_command(values, point)))
        return 0
    with folder.locked(SWEEP, wait=True):
        known = hosts.agreed(-1 if (step := folder.step(run_dir)) is None else step)
        sweep = runner.pinned(None if known < 0 else known)
        folder.open(sweep.content(run_dir, runner.recipe()))
    try:
        failed, elsewhere = runner.go_through(chosen)
    except Stopped as stopped:
        say("the sweep stopped: run the same command again to go on")
        return 128 + stopped.signal
    if hosts.is_first():
        _conclude(folder)
    if elsewhere:
        say(f"other processes are at {elsewhere} points: `jetflow report {folder.path}` when done")
    if failed:
        say(f"failed: {failed} of {len(chosen)} points; the same command tries them again")
    return FAILED if failed else 0


def _fixed(sweep: Sweep, given: list[str]) -> Sweep:
    """The sweep with what --fix gives."""
    fixed = dict(sweep.fixed)
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise UsageError(f"--fix has {text!r}; expected NAME=VALUE, as --fix num_samples=500")
        if any(name in choices for choices in sweep.grid.points):
            raise UsageError(f"--fix has {name}, which is swept; take it off the sweep's axes")
        fixed[name] = value
    return dataclasses.replace(sweep, fixed=fixed)


def _chosen(sweep: Sweep, values: flags.FlagValues) -> list[Point]:
    """The points that --point or --shard asks for; by default all."""
    points = sweep.points
    if values.point is not None:
        if not 0 <= values.point < len(points):
            raise UsageError(f"--point is {values.point}; expected 0 to {len(points) - 1}")
        return [points[values.point]]
    if values.shard is None:
        return points
    first, _, count = values.shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UsageError(f"--shard is {values.shard!r}; expected I/N with I from 0 to N - 1")
    return points[int(first) :: int(count)]


def _command(values: flags.FlagValues, point: Point) -> list[str]:
    """The command line that measures one point."""
    given = {name: values[name].value for name in ("sweep", "workdir", "run", "data_dir")}
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    fixed = [f"--fix={text}" for text in values.fix]
    return ["jetflow", "sweep", *arguments, *fixed, f"--point={point.number}"]


def _conclude(folder: Folder) -> None:
    """The table, and the page beside it."""
    print(columns(**sweep_page(folder.path)["table"]))
    print(f"the page: {report(folder.path)}")
