"""`jetflow bench`: how fast sampling, training and reading are on this machine."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from jetflow.buckets import AnyPath
from jetflow.cli.flags import Command
from jetflow.hosts import ProcessOptions
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import load_model
from jetflow.options import LARGEST_BATCH, MOST_WORKERS, DataOptions, Options, option
from jetflow.sampling.decoding import METHODS
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.tools import throughput
from jetflow.tools.report.document import columns
from jetflow.types import Config, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """What all measurements share."""

    repeats: int = option(5, "timed rounds, after one that compiles or warms up", least=1)
    json: bool = option(False, "print JSON, a line a measurement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(BenchOptions, DataOptions, ProcessOptions):
    config: Config = option(example="configs/NAME.py")
    steps: int = option(10, "steps in a round", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions(BenchOptions, DataOptions):
    config: Config = option(example="configs/NAME.py")
    workers: tuple[int, ...] = option(
        (0, 2), "worker processes; 0 for threads of this one", least=0, most=MOST_WORKERS
    )
    batch_size: int | None = option(
        None, "default: config.train.batch_size", least=1, most=LARGEST_BATCH
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(BenchOptions, SamplingOptions, ModelOptions, ProcessOptions):
    """Of a trained flow, or of a config's with random weights."""

    config: Config = option(None)
    workdir: AnyPath | None = option(
        None, "the folder of a run, for its trained flow; this or config must be given"
    )
    batch_sizes: tuple[int, ...] = option(
        (8, 64), "images made at a time", least=1, most=LARGEST_BATCH
    )
    methods: tuple[str, ...] = option(
        METHODS, "how a TarFlow is inverted", choices=(*METHODS, "auto")
    )
    method: str = dataclasses.field(default="cached", init=False)  # no flag: there are `methods`


def sample(options: SampleOptions) -> None:
    if (options.config is None) == (options.workdir is None):
        raise UsageError("give --workdir runs/NAME of a trained flow, or --config configs/NAME.py")
    mesh, fields = read_mesh(options.mesh), vars(options)
    if options.workdir is None and options.step is not None:
        raise UsageError("--step has no effect on random weights; leave it out")
    trained = options.workdir and load_model(options.workdir, options.step, mesh)
    speeds = throughput.bench_sample(
        trained or options.config, mesh=mesh, batch_sizes=options.batch_sizes,
        methods=options.methods, repeats=options.repeats,
        **{field.name: fields[field.name] for field in dataclasses.fields(SamplingOptions)},
    )  # fmt: skip
    _print(options, speeds, "method batch_size images_per_second ms_per_image peak_bytes sweeps "
           "token_by_token windows")  # fmt: skip


def train(options: TrainOptions) -> None:
    speed = throughput.bench_train(
        options.config, steps=options.steps, repeats=options.repeats, **options.data_fields
    )
    _print(options, [speed], "")


def data(options: ReadOptions) -> None:
    speeds = (
        throughput.bench_data(
            options.config, workers=workers, batch_size=options.batch_size,
            repeats=options.repeats, **options.data_fields,
        )
        for workers in options.workers
    )  # fmt: skip
    _print(options, speeds, "workers batch_size images_per_second images_per_core_second "
           "megabytes_per_second first_batch_seconds open_seconds copied_megabytes")  # fmt: skip


def _print(options: BenchOptions, speeds: Iterable[Any], names: str) -> None:
    """JSON as soon as each is measured, or a table: of these figures, or of all, a line each."""
    records = []
    for speed in speeds:
        records.append(dataclasses.asdict(speed))
        if options.json:
            print(json.dumps(records[-1]), flush=True)
    if not options.json and names:
        header = names.split()
        print(columns(header, [[record[name] for name in header] for record in records]))
    elif not options.json:
        print(columns(["figure", "value"], list(records[0].items())))


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
