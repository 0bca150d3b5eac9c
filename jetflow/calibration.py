"""The windows that decode each block of a TarFlow fastest on this machine, measured once."""

import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jetflow import hosts, sharding
from jetflow.files import if_possible, read_or_set_aside, write_json
from jetflow.flows.stack import Stack
from jetflow.sampling.ancestral import AS_WRITTEN, Sampler
from jetflow.sampling.decoding import WINDOW
from jetflow.types import Decoding

REPEATS = 3
SMALLEST_WINDOW = 8  # of those that are tried
PATIENCE = 2  # windows in a row that are slower than the one before, until the search ends


def fastest(
    sampler: Sampler, base: Decoding, batch_size: int, *, path: Path, step: int
) -> tuple[Decoding, ...]:
    """The fastest decoding of each block, from the calibrations in a file, or measured now.

    Of several processes the first one's file counts.

    Args:
        base: its tolerance and cache are used.
        path: a JSON file, which gets what is measured.
        step: of the checkpoint.
    """
    conditions = {
        "step": step,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "mesh": None if sampler.mesh is None else dict(sampler.mesh.shape),
        "jax": jax.__version__,
        "batch_size": batch_size,
        "temperature": sampler.temperature,
        "tolerance": base.tolerance,
        "cache_dtype": base.cache_dtype,
        "guidance": None if sampler.guidance is None else dataclasses.asdict(sampler.guidance),
    }
    known = read_or_set_aside(path, [{"conditions": dict, "windows": [int]}], [])
    before = [entry["windows"] for entry in known if entry["conditions"] == conditions]
    before = [some for some in before if len(some) == sampler.flow.decoded_blocks and min(some) > 0]
    windows = hosts.agreed(list(before[0]) if before else [])
    if not windows:
        _note(f"measuring how each block decodes fastest, for {path}")
        windows, seconds = calibrate(sampler, base, batch_size)
        entry = {"conditions": conditions, "windows": windows, "seconds": seconds}
        with if_possible("the measurement"):
            write_json(path, [*known, entry])
        _note(f"windows of the blocks: {', '.join(map(str, windows))}")
    return tuple(dataclasses.replace(base, window=window) for window in windows)


def _note(text: str) -> None:
    if hosts.is_first():
        print(text, file=sys.stderr, flush=True)


def calibrate(
    sampler: Sampler, base: Decoding, batch_size: int
) -> tuple[list[int], list[dict[int, float]]]:
    """The window with which each block of a TarFlow decodes fastest on this device.

    Each block gets the tokens that it gets in sampling, and so needs as many sweeps.

    Returns:
        The window of each block, and for each block the seconds by window.
    """
    flow, params = sampler.flow, sampler.variables["params"]
    assert isinstance(flow, Stack)
    index = np.arange(batch_size)
    label = sampler.place(index % flow.num_classes if flow.num_classes else None)
    z = sampler.place(sampler.latents(jax.random.key(0), index))
    measured = []
    numbers = reversed(range(len(flow.blocks)))
    total, hidden = len(flow.blocks), None if hosts.is_first() else True
    for number in tqdm(numbers, "measuring", total, unit=" blocks", disable=hidden, leave=False):
        decode = functools.partial(
            _decode_block, flow.blocks[number], {"params": params[f"blocks_{number}"]}, z, label,
            sampler.guidance,
        )  # fmt: skip

        def seconds(window: int, decode=decode) -> float:
            decoding = dataclasses.replace(base, window=window)
            return hosts.agreed(statistics.median(timed(lambda: decode(decoding), REPEATS)))

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
    lambda block, variables, *inputs: block.apply(variables, *inputs, method="inverse_blocks")[:1],
    static_argnums=0,
    compiler_options=AS_WRITTEN,
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
