"""`jetflow bench`: how fast sampling, training and reading are on this machine."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from jetflow.cli import commands
from jetflow.cli.commands.bench import sample
from jetflow.types import UsageError

WHAT = {"sample": sample}
USAGE = "\n  ".join(part.USAGE for part in WHAT.values())
ARGUMENTS = ("WHAT",)


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags of what `argv` names; of nothing, those that all have."""
    values.set_gnu_getopt(True)
    flag = commands.definer(values)
    text = "timed rounds (of sampling, batches), after one that compiles or warms up"
    flag(flags.DEFINE_integer, "repeats", 5, text, lower_bound=1)
    flag(flags.DEFINE_bool, "json", False, "print JSON, a line a measurement")
    what = argv[1] if len(argv) > 1 else ""
    if what not in ("-h", "--help", "--helpfull"):
        part(what).define(values, argv)


def part(what: str) -> Any:
    """The module that measures it.

    Raises:
        UsageError: if it is nothing that can be measured.
    """
    if what not in WHAT:
        raise UsageError(
            f"{what!r} cannot be measured; expected `jetflow bench WHAT`, where WHAT is one of "
            f"{', '.join(WHAT)}"
        )
    return WHAT[what]


def run(values: flags.FlagValues, what: str) -> int:
    return part(what).run(values)
