"""The windows that decode each block of a TarFlow fastest on this machine, measured once."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jetflow import hosts, sharding
from jetflow.buckets import AnyPath
from jetflow.files import if_possible, read_or_set_aside, write_json
from jetflow.flows.stack import Stack, guidance_of
from jetflow.sampling.ancestral import AS_WRITTEN, Sampler
from jetflow.sampling.decoding import WINDOW
from jetflow.types import Condition, Decoding

REPEATS = 3


def fastest(
    sampler: Sampler, base: Decoding, batch_size: int, *, path: AnyPath, step: int
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
        "noise_level": sampler.noise_level,
    }
    known = read_or_set_aside(path, [{"conditions": dict, "windows": [int]}], [])
    before = [entry["windows"] for entry in known if entry["conditions"] == conditions]
    before = [some for some in before if len(some) == sampler.flow.decoded_blocks and min(some) > 0]
    windows = hosts.agreed(list(before[0]) if before else [])
    if not windows:
        hosts.note(f"measuring how each block decodes fastest, for {path}")
        windows = hosts.agreed(calibrate(sampler, base, batch_size))
        with if_possible("the measurement"):
            write_json(path, [*known, {"conditions": conditions, "windows": windows}])
        hosts.note(f"windows of the blocks: {', '.join(map(str, windows))}")
    return tuple(dataclasses.replace(base, window=window) for window in windows)


def calibrate(sampler: Sampler, base: Decoding, batch_size: int) -> list[int]:
    """The window with which each block of a TarFlow decodes fastest on this device.

    Each block gets the tokens that it gets in sampling, and so needs as many sweeps.
    """
    flow, params = sampler.flow, sampler.variables["params"]
    assert isinstance(flow, Stack)
    index = np.arange(batch_size)
    label = sampler.place(index % flow.num_classes if flow.num_classes else None)
    level = None if sampler.noise_level is None else np.full(batch_size, sampler.noise_level)
    condition = Condition(label, sampler.place(level))
    z = sampler.place(sampler.latents(jax.random.key(0), index))
    tried = windows(flow.latent_shape[0], jax.devices()[0].platform)
    best, hidden = [], None if hosts.is_first() else True
    numbers, total = reversed(range(len(flow.blocks))), len(flow.blocks)
    bar = tqdm(numbers, "measuring", total, unit=" blocks", disable=hidden, leave=False)
    with sharding.on(sampler.mesh):
        for number in bar:
            block, variables = flow.blocks[number].clone(name=None), params[f"blocks_{number}"]
            guidance = guidance_of(flow, number, sampler.guidance)
            inputs = block, {"params": variables}, z, condition, guidance

            def seconds(window: int, inputs=inputs) -> float:
                decoding = dataclasses.replace(base, window=window)
                try:
                    return statistics.median(timed(lambda: _decode(*inputs, decoding), REPEATS))
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    return math.inf  # a wide window's logits can be larger than the memory

            best.append(min(tried, key=seconds))
            z = _decode(*inputs, base)[0]
    return best[::-1]


def windows(tokens: int, platform: str) -> list[int]:
    """Those that are tried: token by token, the widest, and powers of two below it.

    The widest is the default of jacobi on CPUs. On accelerators, which have arithmetic to spare
    with few images, it is all tokens.
    """
    widest = max(1, min(WINDOW if platform == "cpu" else tokens, tokens - 1))
    halves = [2**power for power in range(3, widest.bit_length()) if 2**power < widest]
    return list(dict.fromkeys([1, widest, *reversed(halves)]))


# The inverse of one block; the blocks that are alike share a program.
_decode = jax.jit(
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
