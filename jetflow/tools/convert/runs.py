"""A published checkpoint made a workdir, as of a training that ended before its first step."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jetflow.buckets import AnyPath
from jetflow.checkpoint import Checkpoints
from jetflow.data import sources
from jetflow.files import check_writable
from jetflow.noise import Noise
from jetflow.options import Options, option
from jetflow.tools.convert.models import (
    UNIFORM_SCALE,
    JetSizes,
    Published,
    TarflowSizes,
    read_jet,
    read_tarflow,
)
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, write_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What every model is made a run with."""

    source: Path = option(help="the checkpoint")
    out: AnyPath = option(
        help="the workdir to make; with --reverse, the .pth file", example="runs/NAME"
    )
    data: str = option("", "the data set that `jetflow evaluate` is to use")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarflowOptions(RunOptions, TarflowSizes):
    """A state dict of apple/ml-tarflow."""

    noise_std: float = option(
        help="of the gaussian noise of its training, in [-1, 1] units; 0 for uniform noise",
        least=0.0,
        example="0.05",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItarflowOptions(RunOptions, TarflowSizes):
    """A state dict of apple/ml-itarflow."""

    t0: float = option(0.01, "least noise level of its training, in [-1, 1] units", least=1e-6)
    t1: float = option(help="largest one", least=1e-6, example="0.3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JetOptions(RunOptions, JetSizes):
    """A Jet of google-research/big_vision."""


def tarflow_run(**fields: Any) -> Published:
    """Make a workdir of a TarFlow; takes the fields of `TarflowOptions`."""
    options = TarflowOptions(**fields)
    if options.pixel_scale is None and not options.noise_std:
        options = dataclasses.replace(options, pixel_scale=UNIFORM_SCALE)
    std = options.noise_std
    noise = Noise("gaussian", std) if std else Noise()
    return _make_run(options, lambda: read_tarflow(options.source, options), noise)


def itarflow_run(**fields: Any) -> Published:
    """Make a workdir of an iTARFlow; takes the fields of `ItarflowOptions`."""
    options = ItarflowOptions(**fields)
    noise = Noise("levels", t0=options.t0, t1=options.t1)
    read = functools.partial(read_tarflow, options.source, options, noise_conditional=True)
    return _make_run(options, read, noise)


def jet_run(**fields: Any) -> Published:
    """Make a workdir of a Jet; takes the fields of `JetOptions`."""
    options = JetOptions(**fields)
    return _make_run(options, lambda: read_jet(options.source, options), Noise())


def _make_run(options: RunOptions, read: Callable[[], Published], noise: Noise) -> Published:
    out = options.out
    check_writable("out", out / CONFIG)
    with Checkpoints(out / "checkpoints") as checkpoints:
        is_run = (out / CONFIG).exists() or checkpoints.steps()
    if is_run:
        raise UsageError(f"{out} holds a run already; give another --out")
    published = read()
    if options.data:
        _check_data(options.data, published)
    config = _config(published, noise, options.data)
    variables = dict(published.variables)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": variables.pop("params"),
        "collections": variables,
    }
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(0, state, config)
    write_config(out, config)
    return published


def _check_data(name: str, published: Published) -> None:
    """Raise unless there is such a data set with images, and classes, like the model's."""
    try:
        source = sources.find(name)
    except UsageError as error:
        raise UsageError(str(error).replace("config.data.name", "data")) from error
    if source.image_shape != published.flow.image_shape:
        raise UsageError(
            f"data {name} has images of {source.image_shape}, but the model is for "
            f"{published.flow.image_shape}; give a data set of that shape, or none"
        )
    classes, expected = source.num_classes, published.flow.num_classes
    if expected and classes and classes != expected:
        raise UsageError(
            f"data {name} has {classes} classes, but the model has {expected}; give a data set "
            "with as many, or none"
        )


def _config(published: Published, noise: Noise, data: str) -> dict[str, Any]:
    """The resolved config of the run."""
    splits, flow = sources.find(data).splits if data else (), published.flow
    test = next((split for split in splits if split != "train"), "test")
    splits = {"train_split": "train", "test_split": test}
    sizes = {"image_shape": flow.image_shape, "num_classes": flow.num_classes}
    return {
        "flow": published.section,
        "data": {"name": data, **splits, "labels": flow.num_classes > 0},
        "noise": dataclasses.asdict(noise),
        "train": {"ema_decay": 0.0},
        "eval": {"draws": 4},
        "resolved": {**sizes, "total_steps": 0},
    }
