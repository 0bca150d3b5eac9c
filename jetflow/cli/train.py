"""`jetflow train`: a flow from a config file."""

import dataclasses

from jetflow import hosts, signals
from jetflow.cli.flags import Command
from jetflow.training.loop import Diverged, TrainOptions, train

DIVERGED = 3  # an exit status: to run the command again would end the same way


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions(TrainOptions, hosts.ProcessOptions):
    """The options of a training, and of its processes."""


def run(options: CommandOptions) -> int:
    """The exit status is 0, `DIVERGED`, or 128 + the number of the signal that stopped it."""
    names = [field.name for field in dataclasses.fields(TrainOptions)]
    try:
        train(**{name: getattr(options, name) for name in names})
    except signals.Stopped as stopped:
        return 128 + stopped.signal
    except Diverged as error:
        hosts.note(f"jetflow: {error}")
        return DIVERGED
    return 0


COMMAND = Command(
    "jetflow train --config configs/digits_tarflow.py --workdir runs/digits"
    " --config.train.steps=1000",
    CommandOptions,
    run,
)
