"""The flags on how a TarFlow is decoded, which `sample` and `bench` share."""

import dataclasses

from absl import flags

from jetflow import calibration
from jetflow.cli import commands
from jetflow.model import Model
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS, TOLERANCE, WINDOW, decodings
from jetflow.types import Decoding


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
    path = model.workdir / "checkpoints" / "decoding.json"
    how = calibration.fastest(sampler, base, batch_size, path=path, step=model.step)
    return dataclasses.replace(sampler, decoding=how)
