"""The flags on how a TarFlow is decoded, which `sample` and `bench` share."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jetflow import hosts
from jetflow.cli import commands
from jetflow.files import write_json
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS, TOLERANCE, WINDOW, decodings
from jetflow.tools.bench import sampling
from jetflow.types import Decoding
from jetflow.workdir import Model


def define(values: flags.FlagValues) -> None:
    """--window, --tolerance and --cache_dtype."""
    flag = commands.definer(values)
    flag(flags.DEFINE_integer, "window", WINDOW, "of jacobi: tokens a sweep", lower_bound=1)
    flag(flags.DEFINE_float, "tolerance", TOLERANCE, "of jacobi and auto: a token is settled once "
         "a sweep changes those before it by no more, in units of the blocks' tokens; 0 gives what "
         "token by token gives, to rounding", lower_bound=0.0)  # fmt: skip
    flag(flags.DEFINE_enum, "cache_dtype", None, "of cached keys and values; default: the net's",
         enum_values=["float32", "bfloat16"])  # fmt: skip


def define_method(values: flags.FlagValues) -> None:
    """--method."""
    commands.definer(values)(
        flags.DEFINE_enum, "method", "cached", "how a TarFlow is inverted: token by token, by "
        "windows of tokens in parallel, or as is fastest here, which is measured once",
        enum_values=[*METHODS, "auto"],
    )  # fmt: skip


def with_method(
    sampler: Sampler, method: str, values: flags.FlagValues, model: Model, batch_size: int
) -> Sampler:
    """The sampler, decoding as the flags say; "auto" is measured where that was not yet done.

    Raises:
        UsageError: if the flow has no such method.
    """
    if method != "auto":
        how = decodings(
            model.flow, method, window=values.window, tolerance=values.tolerance,
            cache_dtype=values.cache_dtype,
        )  # fmt: skip
        return dataclasses.replace(sampler, decoding=how)
    base = Decoding(1, values.tolerance, values.cache_dtype)
    if not model.flow.decoded_blocks:
        decodings(model.flow, "jacobi")  # which says why not
    windows = _windows(sampler, model, base, batch_size)
    how = tuple(dataclasses.replace(base, window=window) for window in windows)
    return dataclasses.replace(sampler, decoding=how)


def _windows(sampler: Sampler, model: Model, base: Decoding, batch_size: int) -> list[int]:
    """The windows of the blocks, from the calibrations beside the checkpoint, or measured now.

    Of several processes the first one's file counts.
    """
    conditions = {
        "step": model.step,
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
    path = model.workdir / "checkpoints" / "decoding.json"
    known = _read(path)
    before = [entry["windows"] for entry in known if entry["conditions"] == conditions]
    if windows := hosts.agreed_numbers(before[0] if before else ()):
        return windows
    _say(f"measuring how each block decodes fastest, for {path}")
    windows, seconds = sampling.calibrate(sampler, base, batch_size)
    entry = {"conditions": conditions, "windows": windows, "seconds": seconds}
    try:
        write_json(path, [*known, entry])
    except OSError as error:  # somebody else's run, or one on a disk that is read-only
        _say(f"the measurement is not kept ({error})")
    _say(f"windows of the blocks: {', '.join(map(str, windows))}")
    return windows


def _read(path: Path) -> list[dict[str, Any]]:
    """The calibrations so far; a damaged file counts as none, since they can be measured again."""
    try:
        known = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        known = None
    if not isinstance(known, list) or not all(map(_is_calibration, known)):
        _say(f"{path} is damaged, and will be written anew")
        return []
    return known


def _is_calibration(entry: Any) -> bool:
    return isinstance(entry, dict) and {"conditions", "windows"} <= entry.keys()


def _say(text: str) -> None:
    """Tell a person what is going on: not on standard output, which may be JSON."""
    if hosts.is_first():
        print(text, file=sys.stderr, flush=True)
