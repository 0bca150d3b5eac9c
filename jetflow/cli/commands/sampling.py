"""The flags on how images are drawn, which commands share, and the drawing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from jetflow.cli import commands
from jetflow.cli.commands import decoding
from jetflow.model import Model
from jetflow.noise import Purpose, key_for
from jetflow.sampling.ancestral import Drawn, Sampler, draw_all
from jetflow.types import Guidance, UsageError

# All flags that the images depend on, but for the seed, the labels and the batch size.
SETTINGS = (
    "temperature", "guidance", "guide_what", "attention_temperature", "annealed", "denoise",
    "denoise_std", "method", "window", "tolerance", "cache_dtype",
)  # fmt: skip


def define(values: flags.FlagValues) -> None:
    flag = commands.definer(values)
    flag(flags.DEFINE_float, "temperature", 1.0, "of the prior: multiplies its standard deviation",
         lower_bound=0.0)  # fmt: skip
    flag(flags.DEFINE_float, "guidance", 0.0, "strength of guidance", lower_bound=0.0)
    flag(flags.DEFINE_string, "guide_what", "ab", "guide a (log-scale), b (shift), or ab (both)")
    flag(flags.DEFINE_float, "attention_temperature", 1.0,
         "of guidance's unconditional pass; must differ from 1 without labels")  # fmt: skip
    flag(flags.DEFINE_bool, "annealed", False, "let guidance grow from the first token to the last")
    flag(flags.DEFINE_bool, "denoise", False, "one denoising step, for gaussian training noise")
    flag(flags.DEFINE_float, "denoise_std", None, "strength of that step: the standard deviation "
         "that it takes the noise to have; default: that of training", lower_bound=0.0)  # fmt: skip
    decoding.define_method(values)
    decoding.define(values)


def sampler(values: flags.FlagValues, model: Model, mesh: Mesh, num: int) -> Sampler:
    """What draws `num` images as the flags ask for them.

    Raises:
        UsageError: on flags that this flow does not have.
    """
    noise = model.config["noise"]
    if values.denoise and noise["kind"] != "gaussian":
        raise UsageError("--denoise needs a flow trained with gaussian noise; leave it out")
    if values.denoise_std is not None and not values.denoise:
        raise UsageError(f"--denoise_std is {values.denoise_std}, but --denoise is missing; add it")
    guidance = Guidance(
        values.guidance, values.guide_what, values.attention_temperature, values.annealed
    )
    plain = Sampler(
        model.flow,
        model.variables,
        guidance=guidance,
        temperature=values.temperature,
        denoise=used(values, model)["denoise_std"] or 0.0,
        mesh=mesh,
    )
    return decoding.with_method(plain, values.method, values, model, min(values.batch_size, num))


def draw(
    sampler: Sampler,
    values: flags.FlagValues,
    model: Model,
    *,
    num: int,
    label: Int[np.ndarray, "N"] | None,
    start: int = 0,
) -> Iterator[tuple[UInt8[np.ndarray, "_ H W C"], Drawn]]:
    """The images start, …, num − 1 in batches, and what they were before they were rounded.

    Image i depends on the seed, its label and i alone.
    """
    key, kind = key_for(values.seed, 0, Purpose.SAMPLE), model.config["noise"]["kind"]
    size = values.batch_size
    for drawn in draw_all(sampler, key, num=num, label=label, batch_size=size, start=start):
        yield drawn.images(kind), drawn


def settings(values: flags.FlagValues) -> dict[str, Any]:
    """The values of `SETTINGS`."""
    return {name: values[name].value for name in SETTINGS}


def used(values: flags.FlagValues, model: Model) -> dict[str, Any]:
    """`settings` for the record: `denoise_std` is the one in use, None without denoising."""
    given = values.denoise_std
    std = model.config["noise"]["std"] if given is None else given
    return settings(values) | {"denoise_std": std if values.denoise else None}


def defaults(values: flags.FlagValues) -> dict[str, Any]:
    """What `settings` are where no flag is given."""
    return {name: values[name].default for name in SETTINGS}
