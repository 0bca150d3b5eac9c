"""`jetflow bench`: how fast sampling, training and reading are on this machine."""

import dataclasses
import json
from pathlib import Path

from jetflow.cli.flags import Command
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import load_model
from jetflow.options import LARGEST_BATCH, MOST_WORKERS, DataOptions, option
from jetflow.sampling.decoding import METHODS, TOLERANCE, WINDOW
from jetflow.tools import bench
from jetflow.types import Config, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(DataOptions):
    """What all measurements of a config share."""

    config: Config = option(example="configs/NAME.py")
    repeats: int = option(5, "timed rounds, after one that compiles or warms up", least=1)
    json: bool = option(False, "print JSON, a line a measurement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(BenchOptions):
    steps: int = option(10, "steps in a round", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions(BenchOptions):
    workers: tuple[int, ...] = option(
        (0, 2), "worker processes; 0 for threads of this one", least=0, most=MOST_WORKERS
    )
    batch_size: int | None = option(
        None, "default: config.train.batch_size", least=1, most=LARGEST_BATCH
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(ModelOptions):
    """Of a trained flow, or of a config's with random weights."""

    config: Config = option(None)
    workdir: Path | None = option(None, "the folder of a run, for its trained flow")
    batch_sizes: tuple[int, ...] = option(
        (8, 64), "images made at a time", least=1, most=LARGEST_BATCH
    )
    methods: tuple[str, ...] = option(
        METHODS, "how a TarFlow is inverted", choices=(*METHODS, "auto")
    )
    guidance: float = option(0.0, "strength of guidance", least=0.0)
    attention_temperature: float = option(1.0, "of guidance's unconditional pass")
    window: int = option(WINDOW, "of jacobi: tokens a sweep", least=1)
    tolerance: float = option(TOLERANCE, "of jacobi and auto, as in `jetflow sample`", least=0.0)
    cache_dtype: str | None = option(
        None, "of cached keys and values; default: the net's", choices=("float32", "bfloat16")
    )
    repeats: int = option(5, "timed batches, after one that compiles", least=1)
    json: bool = option(False, "print JSON, a line a measurement")


def sample(options: SampleOptions) -> None:
    mesh = read_mesh(options.mesh)
    if (options.config is None) == (options.workdir is None):
        raise UsageError("give --workdir runs/NAME of a trained flow, or --config configs/NAME.py")
    if options.workdir is None and options.step is not None:
        raise UsageError("--step has no effect on random weights; leave it out")
    if options.workdir is None:
        model, source = bench.untrained(options.config, mesh), "random weights of --config"
    else:
        model, source = load_model(options.workdir, options.step, mesh), options.workdir
    names = ("guidance", "attention_temperature", "window", "tolerance", "cache_dtype")
    speeds = bench.bench_sample(
        model, batch_sizes=options.batch_sizes, methods=options.methods, repeats=options.repeats,
        **options.changed(*names),
    )  # fmt: skip
    for number, speed in enumerate(speeds):
        if options.json:
            print(json.dumps(dataclasses.asdict(speed)), flush=True)
            continue
        if not number:
            print(f"sampling from step {model.step} of {source} on {speed.device}")
            print("method    batch  images/s  ms/image      MB  sweeps (tokens a sweep)")
        blocks = zip(speed.sweeps, speed.windows, speed.token_by_token, strict=True)
        sweeps = ", ".join(f"{count} ({min(window, most)})" for count, window, most in blocks)
        print(
            f"{speed.method:8}  {speed.batch_size:5}  {speed.images_per_second:8.2f}  "
            f"{speed.ms_per_image:8.1f}  {speed.peak_bytes / 1e6:6,.0f}  {sweeps}",
            flush=True,
        )


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


def data(options: ReadOptions) -> None:
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
    "sample": Command(
        "jetflow bench sample --workdir runs/tar32 --batch_sizes 8,64 --methods cached,jacobi",
        SampleOptions,
        sample,
    ),
    "train": Command(
        "jetflow bench train --config configs/photos_tarflow.py --config.train.batch_size=32",
        TrainOptions,
        train,
    ),
    "data": Command(
        "jetflow bench data --config configs/photos_tarflow.py:32 --workers 0,2", ReadOptions, data
    ),
}
