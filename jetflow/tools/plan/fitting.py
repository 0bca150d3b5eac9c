"""The recomputation and the batch with which a run is fastest, of those that fit."""

import bisect
import copy
import functools
import operator
from collections.abc import Callable
from typing import Any

from jetflow import configs, sharding
from jetflow.nn.transformer import REMAT_POLICIES
from jetflow.tools.plan import devices
from jetflow.tools.plan.roofline import Plan, load, plan
from jetflow.types import Config


def fit(
    config: Config,
    topology: str,
    *,
    program: str = "train",
    progress: Callable[[str, int, Plan | None], None] = lambda *_: None,
    **settings: Any,
) -> list[Plan]:
    """For each remat policy, the plan of the largest batch that fits, if any; fastest first.

    Tried are 1, 2, 3, 4, 6, 8, 12, 16, … images on each device at a time, up to the data set: first
    the batch of the config, then what its memory lets expect.

    Args:
        progress: called with the policy, the images on each device and None before each plan is
            compiled, which may take minutes, and with the plan after it.
        settings: of `plan`.
    """
    configs.check(config)
    policies = REMAT_POLICIES if program == "train" else (config.flow.remat,)
    axes = {name: config.mesh[name] for name in sharding.AXES}
    found = devices.devices(topology, settings.get("slices", 1))
    mesh = sharding.make_mesh(**axes, devices=found)
    parts = sharding.batch_parts(mesh)
    rows = {"train": parts * config.train.accumulation, "eval": parts}
    section, split = ("train", "train_split") if program == "train" else ("eval", "test_split")
    most = max(1, len(load(config.data.name, config.data[split])) // rows[section])
    largest = []
    for policy in policies:
        tried: dict[int, Plan] = {}

        def used(size: int, policy: str = policy, tried: dict[int, Plan] = tried) -> float:
            changed = copy.deepcopy(config)
            changed.flow.remat = policy
            for name, least in rows.items():
                changed[name].batch_size = least * (size if name == section else 1)
            each = changed[section].batch_size // parts
            progress(policy, each, None)
            tried[size] = plan(changed, topology, program=program, **settings)
            progress(policy, each, tried[size])
            memory = tried[size].memory
            state = memory.params + memory.optimizer + memory.ema
            return (memory.total - state) / max(1, memory.capacity - state)

        if size := _largest(used, config[section].batch_size // rows[section], most):
            largest.append(tried[size])
    return sorted(largest, key=operator.attrgetter("estimate.images_per_second"), reverse=True)


def _largest(used: Callable[[int], float], start: int, most: int) -> int:
    """The largest size of 1, 2, 3, 4, 6, 8, 12, … `most` that fits, 0 for none.

    Args:
        used: the share that a size takes of the memory for it, about in proportion to the size.
    """
    used = functools.cache(used)
    sizes = sorted({power * factor for power in (2**n for n in range(40)) for factor in (1, 3)})
    sizes = [size for size in sizes if size <= most]
    index, last, share = max(0, bisect.bisect_right(sizes, start) - 1), 0, 0.0
    for _ in range(3):  # along the line through the last two sizes that were tried
        size = sizes[index]
        slope = (used(size) - share) / (size - last)
        if slope <= 0:
            break
        guess = min(16 * size, size + (1 - used(size)) / slope)
        last, share = size, used(size)
        index = max(0, bisect.bisect_right(sizes, guess) - 1)
        if sizes[index] == last:
            break
    while index >= 0 and used(sizes[index]) > 1:
        index -= 1
    while 0 <= index < len(sizes) - 1 and used(sizes[index + 1]) <= 1:
        index += 1
    return sizes[index] if index >= 0 else 0
