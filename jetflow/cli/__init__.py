"""`jetflow COMMAND`: which file does what, help, and errors as one line."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from jetflow import hosts
from jetflow.cli import configs as config
from jetflow.types import UsageError

# Of each command, whose file is read only when it is asked for.
SUMMARIES = {
    "prepare": "Make a data set ready to be read, from archives where it needs some.",
    "train": "Train a flow, or go on training it: the same command resumes.",
    "sample": "Draw samples from a trained flow.",
    "evaluate": "Measure a trained flow; writes JSON into the run's evals folder.",
    "sweep": "Train, sample and evaluate over a grid of settings; the same command resumes.",
    "report": "Make one HTML page of a run or a sweep, or its Markdown or CSV.",
    "plan": "Say what a run needs on a TPU slice, and how long it takes at best.",
    "bench": "Measure how fast sampling, training or reading its data is on this machine.",
    "convert": "Make a workdir of a published checkpoint, or with --reverse a .pth of a workdir.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Exit status 2 means bad input, with one line that says what to do."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"jetflow {importlib.metadata.version('jetflow')}")
        return 0
    name, arguments = argv[0], argv[1:]
    try:
        command = load(name)
        values = flags.FlagValues()
        command.define(values, argv)
        if {"-h", "--help", "--helpfull"} & set(arguments):
            print(_help(name, command, values))
            return 0
        rest = config.parse(values, argv)
        if unexpected := rest[len(command.ARGUMENTS) :]:
            raise UsageError(f"unexpected argument {unexpected[0]!r}; see `jetflow {name} --help`")
        if missing := command.ARGUMENTS[len(rest) :]:
            raise UsageError(f"{missing[0]} is missing; expected {command.USAGE}")
        with hosts.joined(saves_at_signals=name == "train"):
            return command.run(values, *rest)
    except UsageError as error:
        print(f"jetflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training, which handles it itself
        print("jetflow: interrupted", file=sys.stderr)
        return 130


def load(name: str) -> Any:
    """The module of a command.

    Raises:
        UsageError: if there is no such command.
    """
    if name not in SUMMARIES:
        raise UsageError(f"{name!r} is no command; expected one of {', '.join(SUMMARIES)}")
    return importlib.import_module(f"jetflow.cli.commands.{name}")


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        ["jetflow trains, samples and evaluates transformer normalizing flows.", "", *lines, "",
         "jetflow COMMAND --help lists the flags of a command."]
    )  # fmt: skip


def _help(name: str, command: Any, values: flags.FlagValues) -> str:
    seen = dict.fromkeys(values[flag].name for flag in values)
    lines = [f"  --{flag}: {values[flag].help}{_default(values[flag])}" for flag in sorted(seen)]
    return "\n".join([SUMMARIES[name], "", f"  {command.USAGE}", "", *lines])


def _default(flag: flags.Flag) -> str:
    silent = flag.default is None or flag.default is False
    return "" if silent else f" (default {flag.default_as_str})"
