"""How fast sampling is here: throughput, sweeps and memory, and the best window of each block."""

import dataclasses
import statistics

import jax
import numpy as np

from jetflow import calibration
from jetflow.sampling.ancestral import Sampler
from jetflow.tools.plan import costs

REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Speed:
    """What drawing a batch of images takes.

    Attributes:
        method, batch_size: what was measured.
        seconds: of a batch: the median of the repeats, after one that compiles.
        seconds_range: the least and the most.
        images_per_second, ms_per_image: by the median.
        windows: tokens a sweep, of each block of a TarFlow.
        sweeps: evaluations of each block's net; token_by_token: those without windows.
        residual: the largest change of a token that was taken for settled.
        peak_bytes: memory of the compiled program on a device: its weights, caches and the rest.
    """

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


def measure(sampler: Sampler, method: str, batch_size: int, repeats: int = REPEATS) -> Speed:
    """Measure `sampler` on batches of so many images; `method` is the name of its decoding."""
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
        method=method,
        batch_size=batch_size,
        seconds=median,
        seconds_range=(min(times), max(times)),
        images_per_second=batch_size / median,
        ms_per_image=1000 * median / batch_size,
        windows=tuple(how.window for how in sampler.decoding or ()),
        sweeps=drawn.sweeps,
        token_by_token=(flow.latent_shape[0] - 1,) * flow.decoded_blocks,
        residual=drawn.residual,
        peak_bytes=costs.peak_bytes(program),
    )
