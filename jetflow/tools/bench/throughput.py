"""How fast training and the reading of its data are on this machine."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from jetflow import configs, sharding
from jetflow.data import dataset
from jetflow.data.reading import cores
from jetflow.tools.plan import costs
from jetflow.tools.plan.devices import TPUS
from jetflow.training.experiment import set_up
from jetflow.training.step import TrainState
from jetflow.types import Batch, Config

ROUND_SECONDS = 1.0  # of reading, at least, that are timed as one

# Dense bfloat16 matrix products, a second: of GPUs by NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
} | {tpu.kind: tpu.flops for tpu in TPUS.values()}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How fast shuffled training batches reach this host's memory, decoded."""

    data: str  # name of the data set
    split: str
    workers: int  # reading processes, 0 for threads
    batch_size: int
    images_per_second: float  # the median of the rounds, after one that warms up
    images_per_second_range: tuple[float, float]
    images_per_core_second: float  # images by processor time of all processes
    megabytes_per_second: float  # of pixels
    first_batch_seconds: float  # from the start of the workers
    cores: int  # that this process may use


@dataclasses.dataclass(frozen=True)
class Training:
    """How fast the training step of a config is."""

    device: str  # the mesh, in words
    batch_size: int  # over all devices
    step_seconds: float  # with a batch that stays on the devices: the median of the rounds
    step_seconds_range: tuple[float, float]
    steps_per_second: float  # by that median
    images_per_second: float
    step_seconds_with_data: float  # with the real batches, as in training
    images_per_second_with_data: float
    data_wait_share: float  # of that time: the devices waited for data
    model_flops: float  # of a step on each device, by formula, without recomputation
    utilisation: float | None  # model_flops over the device's bfloat16 peak, where that is known
    peak_bytes: int  # memory of the program on each device, with state and batch


def bench_data(
    config: Config,
    *,
    workers: int = 0,
    batch_size: int | None = None,
    repeats: int = 5,
    data_dir: str | None = None,
) -> Reading:
    """Measure the reading of a config's training batches, in `repeats` rounds."""
    configs.check(config)
    source = dataset.load(config.data.name, config.data.train_split, data_dir=data_dir)
    size = batch_size or config.train.batch_size
    start = time.perf_counter()
    batches = dataset.train_batches(source, batch_size=size, seed=0, workers=workers)
    with contextlib.closing(batches):
        image = next(batches).image
        first = time.perf_counter() - start
        _read_round(batches)  # which uses up what was read ahead
        rounds = [_read_round(batches) for _ in range(repeats)]
    speeds = [count * size / seconds for count, seconds, _ in rounds]
    median = statistics.median(speeds)
    return Reading(
        data=source.name,
        split=source.split,
        workers=workers,
        batch_size=size,
        images_per_second=median,
        images_per_second_range=(min(speeds), max(speeds)),
        images_per_core_second=statistics.median(count * size / used for count, _, used in rounds),
        megabytes_per_second=median * image[0].nbytes / 1e6,
        first_batch_seconds=first,
        cores=cores(),
    )


def _read_round(batches: Iterator[Batch]) -> tuple[int, float, float]:
    """Batches, seconds, and seconds of processor time, for `ROUND_SECONDS`."""
    start, processor = time.perf_counter(), processor_seconds()
    count, seconds = 0, 0.0
    while seconds < ROUND_SECONDS:
        next(batches)
        count, seconds = count + 1, time.perf_counter() - start
    return count, seconds, processor_seconds() - processor


def processor_seconds() -> float:
    """Used by this process and its children."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children())]
    return sum(spent.user + spent.system for spent in times)


def bench_train(
    config: Config, *, steps: int = 10, repeats: int = 5, data_dir: str | None = None
) -> Training:
    """Measure the training step of a config, in `repeats` rounds of so many steps."""
    run = set_up(config, functools.partial(dataset.load, data_dir=data_dir))
    size = config.train.batch_size
    state, _ = run.fresh_state()
    step = run.lower_step(state, run.abstract_batch(size)).compile()
    with contextlib.closing(run.batches()) as ahead:
        batch = next(ahead)
        state, rounds = _rounds(step, state, lambda _: (batch, 0.0), steps, repeats)
        _, real = _rounds(step, state, ahead.after, steps, repeats)
    times = [seconds / steps for seconds, _ in rounds]
    median = statistics.median(times)
    with_data = statistics.median(seconds / steps for seconds, _ in real)
    forward = costs.forward_flops(run.abstract_state.params, run.trainer.flow.latent_shape[0])
    flops = 3 * forward * size / run.mesh.size  # the backward pass is two
    peak = PEAK_FLOPS.get(run.mesh.devices.flat[0].device_kind)
    return Training(
        device=sharding.describe(run.mesh),
        batch_size=size,
        step_seconds=median,
        step_seconds_range=(min(times), max(times)),
        steps_per_second=1 / median,
        images_per_second=size / median,
        step_seconds_with_data=with_data,
        images_per_second_with_data=size / with_data,
        data_wait_share=sum(waited for _, waited in real) / sum(seconds for seconds, _ in real),
        model_flops=flops,
        utilisation=flops / median / peak if peak else None,
        peak_bytes=costs.peak_bytes(step),
    )


def _rounds(
    step: Callable[[TrainState, Batch], Any],
    state: TrainState,
    after: Callable[[Any], tuple[Batch, float]],
    steps: int,
    repeats: int,
) -> tuple[TrainState, list[tuple[float, float]]]:
    """Seconds of each round, and those of waiting for data; one more round before warms up.

    Args:
        after: from a step's outputs to the next batch, and the seconds of waiting for it.
    """
    rounds = []
    batch, _ = after(state)
    for _ in range(repeats + 1):
        start, waits = time.perf_counter(), 0.0
        for _ in range(steps):
            state, metrics = step(state, batch)
            batch, waited = after(metrics)
            waits += waited
        jax.block_until_ready(metrics)
        rounds.append((time.perf_counter() - start, waits))
    return state, rounds[1:]
