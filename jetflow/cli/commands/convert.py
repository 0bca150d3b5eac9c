"""`jetflow convert`: a published checkpoint to a workdir, and a workdir to a .pth file."""

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from jetflow.checkpoint import Checkpoints
from jetflow.cli import commands
from jetflow.data import sources
from jetflow.model import load_model
from jetflow.tools.convert import models
from jetflow.tools.convert.models import Published
from jetflow.types import UsageError
from jetflow.workdir import read_config, write_config

USAGE = (
    "jetflow convert tarflow SRC.pth --out runs/tar --image_size 64 --channels 3 --patch_size 2 "
    "--noise_std 0.05"
)
ARGUMENTS = ("MODEL", "SRC")

# Model -> flag -> example, of those that must be given; and those that may be.
NEEDED = {
    "tarflow": {"image_size": "64", "channels": "3", "patch_size": "2", "noise_std": "0.05"},
    "jet": {
        "image_shape": "64,64,3",
        "patch_size": "4",
        "num_heads": "8",
        "kinds": "channels,channels,channels,channels,spatial",
    },
}
OPTIONAL = {"tarflow": ("head_dim", "pixel_scale"), "jet": ("scale_factor",)}
ALWAYS = ("out", "data")
REVERSE = ("out", "reverse")


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the command's flags; they may stand before and after its arguments."""
    del argv
    values.set_gnu_getopt(True)
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "out", None, "the workdir to make; with --reverse, the .pth file")
    flag(flags.DEFINE_bool, "reverse", False, "write the TarFlow of the workdir SRC as a .pth")
    flag(flags.DEFINE_string, "data", "", "the data set that `jetflow evaluate` is to use")
    flag(flags.DEFINE_integer, "patch_size", None, "in pixels", lower_bound=1)
    flag(flags.DEFINE_integer, "image_size", None, "tarflow: height and width in pixels",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_integer, "channels", None, "tarflow: of the image", lower_bound=1)
    flag(flags.DEFINE_integer, "head_dim", models.HEAD_DIM, "tarflow: of an attention head",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_float, "noise_std", None, "tarflow: of the gaussian noise that it was "
         "trained with, in [-1, 1] units; 0 for uniform noise", lower_bound=0.0)  # fmt: skip
    flag(flags.DEFINE_float, "pixel_scale", None, "tarflow: pixels v enter as v / pixel_scale - 1; "
         "default: as published, 127.5 with gaussian noise, 128 with uniform noise")  # fmt: skip
    flag(flags.DEFINE_list, "image_shape", None, "jet: height,width,channels")
    flag(flags.DEFINE_integer, "num_heads", None, "jet: attention heads", lower_bound=1)
    flag(flags.DEFINE_list, "kinds", None, "jet: the cycle of the splits, of channels and spatial")
    flag(flags.DEFINE_float, "scale_factor", 2.0, "jet: bound on a coupling's scale")


def run(values: flags.FlagValues, model: str, source: str) -> int:
    """Convert; returns the exit status.

    Raises:
        UsageError: if a flag is missing, or the source is not such a model.
    """
    if model not in NEEDED:
        raise UsageError(f"{model!r} is no model to convert; expected {' or '.join(NEEDED)}")
    if values.out is None:
        raise UsageError("--out is missing; expected --out runs/NAME, or --out FILE.pth to reverse")
    if values.reverse:
        return _reverse(values, model, Path(source), Path(values.out))
    _check_flags(values, model)
    out = Path(values.out)
    _check_new_workdir(out)
    published = {"tarflow": _read_tarflow, "jet": _read_jet}[model](values, source)
    if values.data:
        check_data(values.data, published)
    config = _config(published, noise_std=values.noise_std or 0.0, data=values.data)
    try:
        _write(published, out, config)
    except OSError as error:
        raise _unwritable(out, error) from error
    _report(published, out, model, config)
    return 0


def _check_flags(values: flags.FlagValues, model: str) -> None:
    """Raise if a flag is missing, or for another model."""
    own = {*ALWAYS, *NEEDED[model], *OPTIONAL[model]}
    for flag in values:
        if values[flag].present and flag not in own:
            (other,) = NEEDED.keys() - {model}
            raise UsageError(f"--{flag} is for {other}, not for {model}; leave it out")
    for flag, example in NEEDED[model].items():
        if values[flag].value is None:
            raise UsageError(f"--{flag} is missing; expected --{flag} {example}, say")


def _check_new_workdir(out: Path) -> None:
    """Raise if a workdir cannot be made there: before the work, as far as that can be known."""
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise _unwritable(out, f"{above} is no folder that can be written")
    if read_config(out) is not None or (out / "checkpoints").exists():
        raise UsageError(f"{out} holds a run already; give another --out")


def _unwritable(out: Path, reason: object) -> UsageError:
    return UsageError(f"--out {out} cannot be written ({reason}); give a path that can")


def _read_tarflow(values: flags.FlagValues, source: str) -> Published:
    noise_std, pixel_scale = values.noise_std, values.pixel_scale
    if not math.isfinite(noise_std):
        raise UsageError(f"--noise_std is {noise_std}; expected 0, or a number such as 0.05")
    if pixel_scale is None:
        pixel_scale = 127.5 if noise_std else 128.0
    return models.read_tarflow(
        source,
        image_size=values.image_size,
        channels=values.channels,
        patch_size=values.patch_size,
        pixel_scale=pixel_scale,
        head_dim=values.head_dim,
    )


def _read_jet(values: flags.FlagValues, source: str) -> Published:
    shape = values.image_shape
    if len(shape) != 3 or not all(size.isdecimal() and int(size) for size in shape):
        raise UsageError(f"--image_shape is {','.join(shape)}; expected height,width,channels")
    return models.read_jet(
        source,
        image_shape=tuple(map(int, shape)),
        patch_size=values.patch_size,
        num_heads=values.num_heads,
        kinds=values.kinds,
        scale_factor=values.scale_factor,
    )


def check_data(name: str, published: Published) -> None:
    """Raise if there is no such data set, or if its images or classes are not the model's."""
    try:
        source = sources.find(name)
    except UsageError as error:
        raise UsageError(str(error).replace("config.data.name", "--data")) from error
    if source.image_shape != published.image_shape:
        raise UsageError(
            f"--data {name} has images of {source.image_shape}, but the model is for "
            f"{published.image_shape}; give a data set of that shape, or none"
        )
    classes = source.num_classes
    if published.num_classes and classes and classes != published.num_classes:
        raise UsageError(
            f"--data {name} has {classes} classes, but the model has {published.num_classes}; give "
            "a data set with as many, or none"
        )


def _config(published: Published, *, noise_std: float, data: str) -> dict[str, Any]:
    """The resolved config of a training that ended before its first step."""
    return {
        "flow": published.section,
        "data": {
            "name": data,
            "train_split": "train",
            "test_split": _held_out_split(data),
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


def _held_out_split(data: str) -> str:
    splits = sources.find(data).splits if data else ()
    return next((split for split in splits if split != "train"), "test")


def _write(published: Published, out: Path, config: dict[str, Any]) -> None:
    """A workdir at step 0; the config comes last, so that one cut short is no run."""
    variables = dict(published.variables)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": variables.pop("params"),
        "collections": variables,
    }
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(0, state, config)
    write_config(out, config)


def _report(published: Published, out: Path, model: str, config: dict[str, Any]) -> None:
    """Say what was made, and the commands that go on with it."""
    where = shlex.quote(str(out))
    count = sum(leaf.size for leaf in jax.tree.leaves(published.variables["params"]))
    print(f"{model} with {count:,} parameters, {published.num_classes} classes: {out}")
    print(f"sample it:   jetflow sample --workdir {where}")
    if config["data"]["name"]:
        print(f"measure it:  jetflow evaluate --workdir {where}")
    else:
        print("measure it:  convert it again with --data NAME, which `jetflow evaluate` needs")
    settings = {f"flow.{name}": value for name, value in published.section.items()}
    settings |= {f"noise.{name}": config["noise"][name] for name in ("kind", "std")}
    settings |= {"data.labels": config["data"]["labels"], "init_from": out}
    del settings["flow.kind"]
    given = [shlex.quote(f"--config.{name}={value}") for name, value in settings.items()]
    print(f"train it on: jetflow train --config A_{model.upper()}.py --workdir … {' '.join(given)}")


def _reverse(values: flags.FlagValues, model: str, source: Path, out: Path) -> int:
    if model != "tarflow":
        raise UsageError(f"--reverse writes a tarflow, not a {model}; jet cannot be written back")
    for flag in values:
        if values[flag].present and flag not in REVERSE:
            raise UsageError(f"--{flag} has no effect with --reverse; leave it out")
    if out.exists():
        raise UsageError(f"{out} exists; give another --out")
    commands.check_writable("out", str(out))
    trained = load_model(source)
    try:
        models.to_tarflow(out, trained.flow, trained.variables)
    except OSError as error:
        raise _unwritable(out, error) from error
    print(f"step {trained.step} of {source}: {out}")
    return 0
