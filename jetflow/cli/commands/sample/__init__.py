"""The flags of `jetflow sample` as sweeps still take them."""

from collections.abc import Sequence

from absl import flags

from jetflow.cli import commands
from jetflow.cli.commands import sampling
from jetflow.noise import LARGEST_SEED


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    commands.define_workdir(values)
    commands.define_step(values)
    commands.define_data_dir(values)
    commands.define_mesh(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "out", "grid.png", "the picture to write")
    flag(flags.DEFINE_integer, "num", None, "number of images", lower_bound=1)
    flag(flags.DEFINE_integer, "seed", 0, "of the images", lower_bound=0, upper_bound=LARGEST_SEED)
    flag(flags.DEFINE_integer, "batch_size", 64, "images made at a time", lower_bound=1)
    sampling.define(values)
