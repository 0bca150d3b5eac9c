"""`jetflow train`: a flow from a config file."""

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jetflow.cli import commands
from jetflow.cli import configs as config
from jetflow.data import dataset as pipeline
from jetflow.training import loop
from jetflow.training.experiment import set_up

USAGE = (
    "jetflow train --config configs/digits_tarflow.py --workdir runs/digits"
    " --config.train.steps=1000"
)
ARGUMENTS = ()


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
    commands.define_workdir(values)
    commands.define_data_dir(values)


def run(values: flags.FlagValues) -> int:
    experiment = commands.required(values, "config", "configs/NAME.py")
    workdir = Path(commands.required(values, "workdir", "runs/NAME"))
    load = functools.partial(pipeline.load, data_dir=values.data_dir)
    return loop.train(set_up(experiment, load), workdir)
