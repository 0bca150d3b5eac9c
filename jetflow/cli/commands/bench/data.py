"""`jetflow bench data`: how fast the training batches of a config are read on this machine."""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from jetflow.cli import commands
from jetflow.cli import configs as config
from jetflow.data import dataset as pipeline
from jetflow.tools.bench import training
from jetflow.types import UsageError

USAGE = "jetflow bench data --config configs/photos_tarflow.py:32 --workers 0,2"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
    commands.define_data_dir(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_list, "workers", ["0", "2"], "worker processes; 0 for threads of this one")
    flag(flags.DEFINE_integer, "batch_size", None, "default: config.train.batch_size",
         lower_bound=1)  # fmt: skip


def run(values: flags.FlagValues) -> int:
    experiment = commands.required(values, "config", "configs/NAME.py")
    counts = []
    for text in values.workers:
        if not text.isdecimal():
            raise UsageError(f"--workers has {text!r}; expected whole numbers, as in --workers 0,2")
        counts.append(int(text))
    section = experiment.data
    dataset = pipeline.load(section.name, section.train_split, data_dir=values.data_dir)
    size = values.batch_size or experiment.train.batch_size
    if not values.json:
        print(f"{dataset.describe()}; shuffled batches of {size}")
        print("workers  images/s  images/core-s    MB/s  first batch, s")
    for workers in counts:
        found = training.reading(dataset, batch_size=size, workers=workers, repeats=values.repeats)
        record = {"data": dataset.name, "split": dataset.split, **dataclasses.asdict(found)}
        print(json.dumps(record) if values.json else _line(found), flush=True)
    return 0


def _line(found: training.Reading) -> str:
    return (
        f"{found.workers:7}  {found.images_per_second:8,.0f}  {found.images_per_core_second:13,.0f}"
        f"  {found.megabytes_per_second:6,.1f}  {found.first_batch_seconds:14.2f}"
    )
