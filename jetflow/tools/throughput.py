"""How fast sampling, training and the reading of its data are on this machine.

Each is timed in rounds, after one that compiles or warms up; a figure is the median of the rounds,
and `_range` has their least and most.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from jetflow import calibration, configs, hosts, sharding
from jetflow.data import dataset
from jetflow.data.reading import cores
from jetflow.model import Model
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS, WINDOW
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.tools.plan import costs, roofline
from jetflow.tools.plan.devices import ACCELERATORS
from jetflow.training.experiment import set_up
from jetflow.training.step import TrainState, abstract_variables, init_variables
from jetflow.types import Batch, Config, UsageError

ROUND_SECONDS = 1.0  # of reading, at least, that are timed as one

# Dense bfloat16 matrix products, a second.
PEAK_FLOPS = {one.kind: one.flops for one in ACCELERATORS.values()}
PEAK_FLOPS["NVIDIA A100-SXM4-40GB"] = ACCELERATORS["a100"].flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What drawing a batch of images takes."""

    device: str
    method: str
    batch_size: int
    seconds: float
    seconds_range: tuple[float, float]
    images_per_second: float
    ms_per_image: float
    windows: tuple[int, ...]  # tokens a sweep, of each block of a TarFlow
    sweeps: tuple[int, ...]  # evaluations of each block's net,
    token_by_token: tuple[int, ...]  # and those without windows
    residual: float  # the largest change of a token that was accepted
    peak_bytes: int  # of the program on a device: its weights, caches and the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How fast shuffled training batches reach this host's memory, decoded."""

    data: str  # name of the data set
    split: str
    workers: int  # reading processes, 0 for threads
    batch_size: int
    images_per_second: float
    images_per_second_range: tuple[float, float]
    images_per_core_second: float  # images by processor time of all processes
    megabytes_per_second: float  # of pixels
    first_batch_seconds: float  # from the start of the workers
    open_seconds: float  # before that, to find the data, and to copy it from a bucket,
    copied_megabytes: float  # of which so much was not on this machine yet
    cores: int  # that this process may use


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How fast the training step of a config is."""

    device: str  # the mesh, in words
    batch_size: int  # over all devices
    step_seconds: float  # with a batch that stays on the devices
    step_seconds_range: tuple[float, float]
    steps_per_second: float
    images_per_second: float
    step_seconds_with_data: float  # with the real batches, as in training
    images_per_second_with_data: float
    data_wait_share: float  # of that time: the devices waited for data
    model_flops: float  # of a step on each device, by formula, without recomputation
    utilisation: float | None  # model_flops over the device's bfloat16 peak, where that is known
    peak_bytes: int  # memory of the program on each device, with state and batch


def bench_sample(
    model: Model | Config,
    *,
    mesh: Mesh | None = None,
    batch_sizes: Sequence[int] = (8, 64),
    methods: Sequence[str] = METHODS,
    repeats: int = 5,
    **fields: Any,
) -> Iterator[Sampling]:
    """The speed of each method with each batch size; a flow inverted in one pass has one method.

    Args:
        model: a trained flow, or a config, for random weights; its data need not be prepared.
        mesh: of a config's flow; default: all devices.
        methods: some of "cached", "jacobi" and "auto".
        fields: of `SamplingOptions`.

    Raises:
        UsageError: on a batch that the devices cannot share equally, or bad fields.
    """
    if not isinstance(model, Model):
        # Token by token takes as long whatever the weights are, while windows settle at once where
        # tokens do not yet depend on each other.
        if tuple(methods) != ("cached",):
            raise UsageError(
                "methods other than cached depend on the weights, and those of a config are "
                "random; give a trained flow (workdir), or cached alone"
            )
        model = _untrained(model, mesh or sharding.make_mesh())
    for size in batch_sizes:
        sharding.check_batch("batch_sizes", size, model.mesh)
        for method in methods if model.flow.decoded_blocks else ("cached",):
            own = {} if method == "jacobi" else {"window": WINDOW}
            options = SamplingOptions(**{**fields, "method": method, **own})
            yield _sampling(model.sampler(options, size), method, size, repeats)


def _untrained(config: Config, mesh: Mesh) -> Model:
    """The flow of a config before its training."""
    run = set_up(config, roofline.load)
    flow = run.trainer.flow
    shardings = sharding.state_shardings(mesh, abstract_variables(flow), config.mesh.rules)
    init = jax.jit(functools.partial(init_variables, flow), out_shardings=shardings)
    return Model(Path(), run.resolved_config, flow, init(jax.random.key(0)), 0, mesh, "params")


def _sampling(sampler: Sampler, method: str, batch_size: int, repeats: int) -> Sampling:
    flow, index, key = sampler.flow, np.arange(batch_size), jax.random.key(0)
    label = index % flow.num_classes if flow.num_classes else None
    drawn = sampler.draw(key, index, label)
    times = calibration.timed(lambda: sampler.draw(key, index, label), repeats)
    z = sampler.place(sampler.latents(key, index))
    program = sampler.lower(z, sampler.place(label)).compile()
    median = statistics.median(times)
    return Sampling(
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        method=method,
        batch_size=batch_size,
        seconds=median,
        seconds_range=(min(times), max(times)),
        images_per_second=batch_size / median,
        ms_per_image=1000 * median / batch_size,
        windows=tuple(each.window for each in sampler.decoding or ()),
        sweeps=drawn.sweeps,
        token_by_token=(flow.latent_shape[0] - 1,) * flow.decoded_blocks,
        residual=drawn.residual,
        peak_bytes=sharding.peak_bytes(program),
    )


def bench_data(
    config: Config,
    *,
    workers: int = 0,
    batch_size: int | None = None,
    repeats: int = 5,
    **data: Any,
) -> Reading:
    """Measure the reading of a config's training batches; `data`: fields of `DataOptions`."""
    configs.check(config)
    size = batch_size or config.train.batch_size
    start = time.perf_counter()
    source = dataset.load(config.data.name, config.data.train_split, **data)
    hosts.note(f"reading {source.describe()}, with {workers or 'no'} workers")
    opened, start = time.perf_counter() - start, time.perf_counter()
    batches = dataset.train_batches(source, batch_size=size, seed=0, workers=workers)
    with contextlib.closing(batches):
        image = next(batches).image
        first = time.perf_counter() - start
        # The first round uses up what was read ahead.
        rounds = [_read(batches) for _ in range(repeats + 1)][1:]
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
        open_seconds=opened,
        copied_megabytes=source.copied / 1e6,
        cores=cores(),
    )


def _read(batches: Iterator[Batch]) -> tuple[int, float, float]:
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


def bench_train(config: Config, *, steps: int = 10, repeats: int = 5, **data: Any) -> Training:
    """Measure the training step of a config, in rounds of so many steps."""
    run = set_up(config, functools.partial(dataset.load, **data))
    size = config.train.batch_size
    state, _ = run.fresh_state()
    step = run.lower_step(state, run.abstract_batch(size)).compile()
    with contextlib.closing(run.batches()) as ahead:
        batch = next(ahead)
        state, rounds = _train(step, state, lambda _: (batch, 0.0), steps, repeats)
        _, real = _train(step, state, ahead.after, steps, repeats)
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
        peak_bytes=sharding.peak_bytes(step),
    )


def _train(
    step: Callable[[TrainState, Batch], Any],
    state: TrainState,
    after: Callable[[Any], tuple[Batch, float]],
    steps: int,
    repeats: int,
) -> tuple[TrainState, list[tuple[float, float]]]:
    """Seconds of each round, and those of waiting for data.

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
