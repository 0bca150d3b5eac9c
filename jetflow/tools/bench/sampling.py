"""How fast sampling is here: throughput, sweeps and memory, and the best window of each block."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jetflow import hosts, sharding
from jetflow.flows.stack import Stack
from jetflow.sampling.ancestral import AS_WRITTEN, Sampler
from jetflow.sampling.decoding import WINDOW
from jetflow.tools.plan import costs
from jetflow.types import Decoding

REPEATS = 3
SMALLEST_WINDOW = 8  # of those that are tried
PATIENCE = 2  # windows in a row that are slower than the one before, until the search ends


def calibrate(
    sampler: Sampler, base: Decoding, batch_size: int
) -> tuple[list[int], list[dict[int, float]]]:
    """The window with which each block of a TarFlow decodes fastest on this device.

    Each block gets the tokens that it gets in sampling, so it is given as many sweeps as there.

    Args:
        base: its tolerance and cache are used.
        batch_size: of the images that are decoded.

    Returns:
        The window of each block, and for each block the seconds by window.
    """
    flow, params = sampler.flow, sampler.variables["params"]
    assert isinstance(flow, Stack)
    index = np.arange(batch_size)
    label = sampler.place(index % flow.num_classes if flow.num_classes else None)
    z = sampler.place(sampler.latents(jax.random.key(0), index))
    measured = []
    for number in reversed(range(len(flow.blocks))):
        decode = functools.partial(
            _decode_block, flow.blocks[number], {"params": params[f"blocks_{number}"]}, z, label,
            sampler.guidance,
        )  # fmt: skip

        def seconds(window: int, decode=decode) -> float:
            how = dataclasses.replace(base, window=window)
            return hosts.agreed(statistics.median(timed(lambda: decode(how), REPEATS)))

        with sharding.on(sampler.mesh):
            measured.append(seconds_by_window(seconds, flow.latent_shape[0]))
            z = decode(base)
    measured = measured[::-1]
    return [min(times, key=times.__getitem__) for times in measured], measured


def seconds_by_window(seconds: Callable[[int], float], tokens: int) -> dict[int, float]:
    """The time of a block's decoding by window.

    Token by token and the default window of jacobi come first, so that the best is no slower than
    either; then smaller windows, halved until they only get slower.
    """
    widest = max(1, min(WINDOW, tokens - 1))
    times = {window: seconds(window) for window in dict.fromkeys((1, widest))}
    slower, last = 0, times[widest]
    window = 2 ** ((widest - 1).bit_length() - 1) if widest > 2 else 0
    while window >= SMALLEST_WINDOW and slower < PATIENCE:
        times[window] = seconds(window)
        slower = 0 if times[window] < last else slower + 1
        window, last = window // 2, times[window]
    return times


def _decode_block(block, variables, z, label, guidance, decoding):
    """The inverse of one block; the blocks that are alike share a program."""
    return _jitted_block(block.clone(name=None), variables, z, label, guidance, decoding)[0]


_jitted_block = jax.jit(
    lambda block, variables, *inputs: block.apply(variables, *inputs, method="inverse"),
    static_argnums=0,
    compiler_options=AS_WRITTEN,
)


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
    times = timed(lambda: sampler.draw(key, index, label), repeats)
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


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times
