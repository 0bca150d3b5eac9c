"""`jetflow bench train`: how fast the training step of a config is on this machine."""

import dataclasses
import functools
import json
from collections.abc import Sequence

from absl import flags

from jetflow import sharding
from jetflow.cli import commands
from jetflow.cli import configs as config
from jetflow.data import dataset as pipeline
from jetflow.tools.bench import training
from jetflow.training.experiment import set_up

USAGE = "jetflow bench train --config configs/photos_tarflow.py --config.train.batch_size=32"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
    commands.define_data_dir(values)
    text = "steps in a round"
    commands.definer(values)(flags.DEFINE_integer, "steps", 10, text, lower_bound=1)


def run(values: flags.FlagValues) -> int:
    experiment = commands.required(values, "config", "configs/NAME.py")
    load = functools.partial(pipeline.load, data_dir=values.data_dir)
    run = set_up(experiment, load)
    found = training.measure(run, steps=values.steps, repeats=values.repeats)
    device = sharding.describe(run.mesh)
    if values.json:
        print(json.dumps({"device": device, **dataclasses.asdict(found)}))
    else:
        print(f"{run.config.flow.kind}, {found.batch_size} images a step, on {device}")
        print(describe(found))
    return 0


def describe(found: training.Training) -> str:
    """A measurement for a person."""
    least, most = (1000 * seconds for seconds in found.step_seconds_range)
    share = "" if found.utilisation is None else f", {found.utilisation:.1%} of bfloat16's peak"
    rate = found.model_flops * found.steps_per_second
    return "\n".join([
        f"step           {1000 * found.step_seconds:,.1f} ms ({least:,.1f} to {most:,.1f}), "
        f"{found.steps_per_second:,.2f} steps/s, {found.images_per_second:,.0f} images/s",
        f"with its data  {1000 * found.step_seconds_with_data:,.1f} ms, "
        f"{found.images_per_second_with_data:,.0f} images/s, "
        f"{found.data_wait_share:.1%} of it waiting for data",
        f"a device       {found.model_flops / 1e9:,.2f} GFLOPs a step by formula: "
        f"{rate / 1e12:,.3f} TFLOPs/s{share}",
        f"memory         {found.peak_bytes / 1e6:,.0f} MB a device",
    ])  # fmt: skip
