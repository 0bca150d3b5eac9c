"""`jetflow bench`: how fast training and reading are on this machine."""

import dataclasses
import json

from jetflow.cli.flags import Command
from jetflow.options import Options, option
from jetflow.tools import bench
from jetflow.types import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """What all measurements of a config share."""

    config: Config = option(example="configs/NAME.py")
    data_dir: str | None = option(
        None, "prepared data sets; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    )
    repeats: int = option(5, "timed rounds, after one that compiles or warms up", least=1)
    json: bool = option(False, "print JSON, a line a measurement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(BenchOptions):
    steps: int = option(10, "steps in a round", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(BenchOptions):
    workers: tuple[int, ...] = option(
        (0, 2), "worker processes; 0 for threads of this one", least=0
    )
    batch_size: int | None = option(None, "default: config.train.batch_size", least=1)


def train(options: TrainOptions) -> None:
    speed = bench.bench_train(
        options.config, steps=options.steps, repeats=options.repeats, data_dir=options.data_dir
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(speed)))
        return
    least, most = (1000 * seconds for seconds in speed.step_seconds_range)
    share = "" if speed.utilisation is None else f", {speed.utilisation:.1%} of bfloat16's peak"
    rate = speed.model_flops * speed.steps_per_second / 1e12
    print(f"{options.config.flow.kind}, {speed.batch_size} images a step, on {speed.device}")
    print(
        f"step           {1000 * speed.step_seconds:,.1f} ms ({least:,.1f} to {most:,.1f}), "
        f"{speed.steps_per_second:,.2f} steps/s, {speed.images_per_second:,.0f} images/s\n"
        f"with its data  {1000 * speed.step_seconds_with_data:,.1f} ms, "
        f"{speed.images_per_second_with_data:,.0f} images/s, "
        f"{speed.data_wait_share:.1%} of it waiting for data\n"
        f"a device       {speed.model_flops / 1e9:,.2f} GFLOPs a step by formula: "
        f"{rate:,.3f} TFLOPs/s{share}\n"
        f"memory         {speed.peak_bytes / 1e6:,.0f} MB a device"
    )


def data(options: DataOptions) -> None:
    for number, workers in enumerate(options.workers):
        speed = bench.bench_data(
            options.config,
            workers=workers,
            batch_size=options.batch_size,
            repeats=options.repeats,
            data_dir=options.data_dir,
        )
        if options.json:
            print(json.dumps(dataclasses.asdict(speed)), flush=True)
            continue
        if not number:
            print(f"{speed.data} {speed.split}, shuffled batches of {speed.batch_size}")
            print("workers  images/s  images/core-s    MB/s  first batch, s")
        print(
            f"{workers:7}  {speed.images_per_second:8,.0f}  {speed.images_per_core_second:13,.0f}  "
            f"{speed.megabytes_per_second:6,.1f}  {speed.first_batch_seconds:14.2f}",
            flush=True,
        )


COMMANDS = {
    "train": Command(
        "jetflow bench train --config configs/photos_tarflow.py --config.train.batch_size=32",
        TrainOptions,
        train,
    ),
    "data": Command(
        "jetflow bench data --config configs/photos_tarflow.py:32 --workers 0,2", DataOptions, data
    ),
}
