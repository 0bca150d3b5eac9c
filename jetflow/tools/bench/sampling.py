"""How fast a flow draws images on this machine: throughput, sweeps and memory."""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jetflow import calibration, sharding
from jetflow.model import Model
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.tools.plan import costs, roofline
from jetflow.training.experiment import set_up
from jetflow.training.step import abstract_variables, init_variables
from jetflow.types import Config, UsageError


@dataclasses.dataclass(frozen=True)
class Speed:
    """What drawing a batch of images takes.

    Attributes:
        device: on which.
        method, batch_size: what was measured.
        seconds: of a batch, the median of the repeats, after one that compiles.
        seconds_range: the least and the most.
        images_per_second, ms_per_image: by the median.
        windows: tokens a sweep, of each block of a TarFlow.
        sweeps: evaluations of each block's net; token_by_token: those without windows.
        residual: the largest change of a token that was accepted.
        peak_bytes: memory of the compiled program on a device: its weights, caches and the rest.
    """

    device: str
    method: str
    batch_size: int
    seconds: float
    seconds_range: tuple[float, float]
    images_per_second: float
    ms_per_image: float
    windows: tuple[int, ...]
    sweeps: tuple[int, ...]
    token_by_token: tuple[int, ...]
    residual: float
    peak_bytes: int


def bench_sample(
    model: Model,
    *,
    batch_sizes: Sequence[int] = (8, 64),
    methods: Sequence[str] = METHODS,
    repeats: int = 5,
    **fields: Any,
) -> Iterator[Speed]:
    """The speed of each method with each batch size; a flow inverted in one pass has one method.

    Args:
        model: trained, or `untrained`.
        methods: some of "cached", "jacobi" and "auto".
        repeats: timed batches, after one that compiles.
        fields: of `SamplingOptions`.

    Raises:
        UsageError: on a batch that the devices cannot share equally, or bad fields.
    """
    if model.workdir == Path() and tuple(methods) != ("cached",):
        raise UsageError(
            "methods other than cached depend on the weights, and those of a config are random; "
            "give a trained flow (workdir), or cached alone"
        )
    for size in batch_sizes:
        sharding.check_batch("batch_sizes", size, model.mesh)
        for method in methods if model.flow.decoded_blocks else ("cached",):
            sampler = model.sampler(SamplingOptions(method=method, **fields), size)
            yield _speed(sampler, method, size, repeats)


def untrained(config: Config, mesh: Mesh) -> Model:
    """The flow of a config before its training; its data set need not be prepared.

    Token by token takes as long whatever the weights are, while windows settle at once where tokens
    do not yet depend on each other.
    """
    run = set_up(config, roofline.load)
    init = functools.partial(init_variables, run.trainer.flow)
    abstract = abstract_variables(run.trainer.flow)
    shardings = sharding.state_shardings(mesh, abstract, config.mesh.rules)
    variables = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    return Model(Path(), run.resolved_config, run.trainer.flow, variables, 0, mesh, "params")


def _speed(sampler: Sampler, method: str, batch_size: int, repeats: int) -> Speed:
    flow = sampler.flow
    index = np.arange(batch_size)
    label = index % flow.num_classes if flow.num_classes else None
    key = jax.random.key(0)
    drawn = sampler.draw(key, index, label)
    times = calibration.timed(lambda: sampler.draw(key, index, label), repeats)
    median = statistics.median(times)
    z = sampler.place(sampler.latents(key, index))
    program = sampler.lower(z, sampler.place(label)).compile()
    return Speed(
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
        peak_bytes=costs.peak_bytes(program),
    )
