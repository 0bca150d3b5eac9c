"""`jetflow COMMAND`: which file does what, help, and errors as one line.

Each command is a file of its name with a `COMMAND`, or with `COMMANDS` by their second word.
"""

import importlib
import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from jetflow import hosts
from jetflow.cli.flags import Command, help_text, parse
from jetflow.fields import flat
from jetflow.files import disk_errors_explained
from jetflow.options import Options
from jetflow.tools.plan.devices import silence_compilers
from jetflow.types import UsageError

SUMMARIES = {
    "prepare": "Make a data set ready to be read, from archives where it needs some.",
    "train": "Train a flow, or go on training it: the same command resumes.",
    "sample": "Draw samples from a trained flow.",
    "encode": "Write the latents of a data set, under a trained flow, into an .npz.",
    "evaluate": "Measure a trained flow; writes JSON into the run's evals folder.",
    "sweep": "Train, sample and evaluate over a grid of settings; the same command resumes.",
    "report": "Make one HTML page of a run or a sweep, or its Markdown or CSV.",
    "plan": "Say what a run needs on TPUs or NVIDIA GPUs, and how long it takes at best.",
    "bench": "Measure how fast sampling, training or reading its data is on this machine.",
    "convert": "Make a workdir of a published checkpoint, or with --reverse a .pth of a workdir.",
}
HELP = {"-h", "--help", "--helpfull"}
# Options that may differ from machine to machine.
LOCAL = {"data_dir", "data_cache", "data_cache_gb"}
LOCAL |= {"manual_dir", "inception_weights", "join_timeout"}
# A word of a command that goes on where it ended.
GOING_ON = {"prepare", "train", "sweep", "encode", "--npz"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Exit status 2 means bad input, with one line that says what to do."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with disk_errors_explained():
            status = _run(words)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _ended(str(error), error.status)
    except MemoryError as error:
        return _ended(f"out of memory ({error}); take smaller batches or fewer images", 2)
    except KeyboardInterrupt:  # outside of training, which handles it itself
        goes_on = GOING_ON & {word.partition("=")[0] for word in words}
        _ended("interrupted" + "; the same command goes on" * bool(goes_on), 130)
        if argv is None:  # a library's thread may be at work, and crash at Python's own end
            sys.stdout.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:  # whoever reads standard output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in {*HELP, "help"}:
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"jetflow {importlib.metadata.version('jetflow')}")
        return 0
    silence_compilers()
    logging.basicConfig(format="jetflow: %(message)s")
    if HELP & set(argv[1:2]) and argv[0] in SUMMARIES:
        print(SUMMARIES[argv[0]], *map(help_text, _commands(argv[0]).values()), sep="\n\n")
        return 0
    command, argv = find(argv)
    if HELP & set(argv):
        print(help_text(command))
        return 0
    options = parse(command, argv)
    processes = options if isinstance(options, hosts.ProcessOptions) else None
    joined = hosts.joined(facts(argv[0], options), processes, saves_at_signals=argv[0] == "train")
    with joined, disk_errors_explained():
        return command.run(options) or 0


def _ended(why: str, status: int) -> int:
    print(f"jetflow: {' '.join(why.splitlines())}", file=sys.stderr)
    return status


def facts(name: str, options: Options) -> dict[str, Any]:
    """What several processes of a run must be asked for alike; their disks may differ."""
    given = {f"--{name}": value for name, value in vars(options).items() if name not in LOCAL}
    config = given.pop("--config", None)
    return {"the command": name, **(flat(config.to_dict()) if config else {}), **given}


def find(argv: Sequence[str]) -> tuple[Command, list[str]]:
    """The command, and the command line with its name as one word.

    Raises:
        UsageError: if there is no such command.
    """
    name, arguments = argv[0], list(argv[1:])
    if name not in SUMMARIES:
        raise UsageError(f"{name!r} is no command; expected one of {', '.join(SUMMARIES)}")
    commands = _commands(name)
    if "" in commands:
        return commands[""], [name, *arguments]
    for words, command in commands.items():  # such as "train", or "--reverse tarflow"
        *switches, word = words.split()
        rest = [each for each in arguments if each not in switches]
        if set(switches) <= set(arguments) and rest[:1] == [word]:
            return command, [f"{name} {words}", *rest[1:]]
    raise UsageError(
        f"{' '.join(argv[:2])!r} is no command; expected jetflow {name} followed by one of "
        + ", ".join(commands)
    )


def _commands(name: str) -> dict[str, Command]:
    """The commands in a command's file, by their second word."""
    module = importlib.import_module(f"jetflow.cli.{name}")
    return getattr(module, "COMMANDS", None) or {"": module.COMMAND}


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        ["jetflow trains, samples and evaluates transformer normalizing flows.", "", *lines, "",
         "jetflow COMMAND --help lists the flags of a command."]
    )  # fmt: skip
