"""`jetflow train`: a flow from a config file."""

from jetflow import hosts, signals
from jetflow.cli.flags import Command
from jetflow.training.loop import Diverged, TrainOptions, train

DIVERGED = 3  # an exit status: to run the command again would end the same way


def run(options: TrainOptions) -> int:
    """The exit status is 0, `DIVERGED`, or 128 + the number of the signal that stopped it."""
    try:
        train(**vars(options))
    except signals.Stopped as stopped:
        return 128 + stopped.signal
    except Diverged as error:
        hosts.note(f"jetflow: {error}")
        return DIVERGED
    return 0


COMMAND = Command(
    "jetflow train --config configs/digits_tarflow.py --workdir runs/digits"
    " --config.train.steps=1000",
    TrainOptions,
    run,
)
