"""A published checkpoint made a workdir, as of a training that ended before its first step."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jetflow.checkpoint import Checkpoints
from jetflow.data import sources
from jetflow.files import check_writable
from jetflow.options import Options, option
from jetflow.tools.convert.models import HEAD_DIM, Published, read_jet, read_tarflow
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, write_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What every model is made a run with."""

    source: Path = option(help="the checkpoint")
    out: Path = option(
        help="the workdir to make; with --reverse, the .pth file", example="runs/NAME"
    )
    data: str = option("", "the data set that `jetflow evaluate` is to use")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarflowOptions(RunOptions):
    """A state dict of apple/ml-tarflow."""

    image_size: int = option(help="height and width in pixels", least=1, example="64")
    channels: int = option(help="of the image", least=1, example="3")
    patch_size: int = option(help="in pixels", least=1, example="2")
    noise_std: float = option(
        help="of the gaussian noise of its training, in [-1, 1] units; 0 for uniform noise",
        least=0.0,
        example="0.05",
    )
    pixel_scale: float | None = option(
        None,
        "pixels v enter as v / pixel_scale - 1; default: as published, 127.5 with gaussian noise, "
        "128 with uniform noise",
    )
    head_dim: int = option(HEAD_DIM, "features of an attention head", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JetOptions(RunOptions):
    """A Jet of google-research/big_vision."""

    image_shape: tuple[int, ...] = option(help="height,width,channels", least=1, example="64,64,3")
    patch_size: int = option(help="in pixels", least=1, example="4")
    num_heads: int = option(help="attention heads", least=1, example="8")
    kinds: tuple[str, ...] = option(
        help="the cycle of the splits",
        choices=("channels", "spatial"),
        example="channels,channels,channels,channels,spatial",
    )
    scale_factor: float = option(2.0, "bound on a coupling's scale")


def tarflow_run(**fields: Any) -> Published:
    """Make a workdir of a TarFlow; takes the fields of `TarflowOptions`."""
    options = TarflowOptions(**fields)
    scale = options.pixel_scale
    read = functools.partial(
        read_tarflow,
        options.source,
        image_size=options.image_size,
        channels=options.channels,
        patch_size=options.patch_size,
        pixel_scale=(127.5 if options.noise_std else 128.0) if scale is None else scale,
        head_dim=options.head_dim,
    )
    return _make_run(options, read, options.noise_std)


def jet_run(**fields: Any) -> Published:
    """Make a workdir of a Jet; takes the fields of `JetOptions`."""
    options = JetOptions(**fields)
    read = functools.partial(
        read_jet,
        options.source,
        image_shape=options.image_shape,
        patch_size=options.patch_size,
        num_heads=options.num_heads,
        kinds=options.kinds,
        scale_factor=options.scale_factor,
    )
    return _make_run(options, read, noise_std=0.0)


def _make_run(options: RunOptions, read: Callable[[], Published], noise_std: float) -> Published:
    out = options.out
    check_writable("out", out / CONFIG)
    with Checkpoints(out / "checkpoints") as checkpoints:
        is_run = (out / CONFIG).exists() or checkpoints.steps()
    if is_run:
        raise UsageError(f"{out} holds a run already; give another --out")
    published = read()
    if options.data:
        _check_data(options.data, published)
    config = _config(published, noise_std, options.data)
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
    if source.image_shape != published.image_shape:
        raise UsageError(
            f"data {name} has images of {source.image_shape}, but the model is for "
            f"{published.image_shape}; give a data set of that shape, or none"
        )
    classes = source.num_classes
    if published.num_classes and classes and classes != published.num_classes:
        raise UsageError(
            f"data {name} has {classes} classes, but the model has {published.num_classes}; give "
            "a data set with as many, or none"
        )


def _config(published: Published, noise_std: float, data: str) -> dict[str, Any]:
    """The resolved config of the run."""
    splits = sources.find(data).splits if data else ()
    return {
        "flow": published.section,
        "data": {
            "name": data,
            "train_split": "train",
            "test_split": next((split for split in splits if split != "train"), "test"),
            "labels": published.num_classes > 0,
        },
        "noise": {
            "kind": "gaussian" if noise_std else "uniform",
            "std": noise_std,
            "label_drop": 0.0,
            "flip": False,
        },
        "train": {"ema_decay": 0.0},
        "eval": {"draws": 4},
        "resolved": {
            "image_shape": published.image_shape,
            "num_classes": published.num_classes,
            "total_steps": 0,
        },
    }
