"""`jetflow convert`: a published checkpoint to a workdir, and a workdir to a .pth file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from jetflow.checkpoint import Checkpoints
from jetflow.convert import models
from jetflow.convert.models import Published
from jetflow.types import UsageError
from jetflow.workdir import CONFIG, load_model, read_config, write_json

USAGE = "jetflow convert tarflow SRC.pth --out runs/tar --image_size 64 --channels 3 --patch_size 2"
ARGUMENTS = ("MODEL", "SRC")
MODELS = ("tarflow", "jet")
NEEDED = {
    "tarflow": {"image_size": "64", "channels": "3", "patch_size": "2"},
    "jet": {
        "image_shape": "64,64,3",
        "patch_size": "4",
        "num_heads": "8",
        "kinds": "channels,channels,channels,channels,spatial",
    },
}


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the command's flags; they may stand before and after its arguments."""
    del argv
    values.set_gnu_getopt(True)
    add: Any = {"flag_values": values}
    flags.DEFINE_string("out", None, "the workdir to make; with --reverse, the .pth file", **add)
    flags.DEFINE_bool("reverse", False, "write the TarFlow of the workdir SRC as a .pth", **add)
    flags.DEFINE_integer("patch_size", None, "in pixels", lower_bound=1, **add)
    flags.DEFINE_integer(
        "image_size", None, "tarflow: height and width in pixels", lower_bound=1, **add
    )
    flags.DEFINE_integer("channels", None, "tarflow: of the image", lower_bound=1, **add)
    flags.DEFINE_integer("head_dim", 64, "tarflow: of an attention head", lower_bound=1, **add)
    flags.DEFINE_float(
        "noise_std", 0.0, "tarflow: of the gaussian noise that it was trained with, in [-1, 1] "
        "units; 0 for uniform noise", lower_bound=0.0, **add,
    )  # fmt: skip
    flags.DEFINE_float(
        "pixel_scale", None, "tarflow: pixels v enter as v / pixel_scale - 1; default: 127.5 with "
        "gaussian noise, 128 without", **add,
    )  # fmt: skip
    flags.DEFINE_list("image_shape", None, "jet: height,width,channels", **add)
    flags.DEFINE_integer("num_heads", None, "jet: attention heads", lower_bound=1, **add)
    flags.DEFINE_list("kinds", None, "jet: the cycle of the splits, of channels and spatial", **add)
    flags.DEFINE_float("scale_factor", 2.0, "jet: bound on a coupling's scale", **add)
    flags.DEFINE_string("data", "", "the data set that `jetflow evaluate` is to use", **add)


def run(values: flags.FlagValues, model: str, source: str) -> int:
    """Convert; returns the exit status.

    Raises:
        UsageError: if a flag is missing, or the source is not such a model.
    """
    if model not in MODELS:
        raise UsageError(f"{model!r} is no model to convert; expected {' or '.join(MODELS)}")
    if values.out is None:
        raise UsageError("--out is missing; expected --out runs/NAME, or --out FILE.pth to reverse")
    if values.reverse:
        return _reverse(model, Path(source), Path(values.out))
    out = Path(values.out)
    if read_config(out) is not None or (out / "checkpoints").exists():
        raise UsageError(f"{out} holds a run already; give another --out")
    for flag, example in NEEDED[model].items():
        if values[flag].value is None:
            raise UsageError(f"--{flag} is missing; expected --{flag} {example}, say")
    for flag in values:
        only = (values[flag].help or "").partition(":")[0]
        if only in MODELS and only != model and values[flag].present:
            raise UsageError(f"--{flag} is for {only}, not for {model}; leave it out")
    published = {"tarflow": _read_tarflow, "jet": _read_jet}[model](values, source)
    _write(published, out, noise_std=values.noise_std, data=values.data)
    count = sum(leaf.size for leaf in jax.tree.leaves(published.variables["params"]))
    print(f"{model} with {count:,} parameters, {published.num_classes} classes: {out}")
    print(f"sample it:   jetflow sample --workdir {out}")
    print(f"go on:       jetflow train --config … --config.train.init_from={out} --workdir …")
    return 0


def _read_tarflow(values: flags.FlagValues, source: str) -> Published:
    return models.read_tarflow(
        source,
        image_size=values.image_size,
        channels=values.channels,
        patch_size=values.patch_size,
        pixel_scale=values.pixel_scale or (127.5 if values.noise_std else 128.0),
        head_dim=values.head_dim,
    )


def _read_jet(values: flags.FlagValues, source: str) -> Published:
    shape = values.image_shape
    if len(shape) != 3 or not all(size.isdecimal() and int(size) for size in shape):
        raise UsageError(f"--image_shape is {','.join(shape)}; expected height,width,channels")
    height, width, channels = map(int, shape)
    return models.read_jet(
        source,
        image_shape=(height, width, channels),
        patch_size=values.patch_size,
        num_heads=values.num_heads,
        kinds=values.kinds,
        scale_factor=values.scale_factor,
    )


def _write(published: Published, out: Path, *, noise_std: float, data: str) -> None:
    """A workdir at step 0; the config comes last, so that one cut short is no run."""
    config = {
        "flow": published.section,
        "data": {
            "name": data,
            "train_split": "train",
            "test_split": "test",
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
    variables = dict(published.variables)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": variables.pop("params"),
        "collections": variables,
    }
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(0, state, config, wait=True)
    write_json(out / CONFIG, config)


def _reverse(model: str, source: Path, out: Path) -> int:
    if model != "tarflow":
        raise UsageError(f"--reverse writes a tarflow, not a {model}")
    if out.is_dir() or out.exists():
        raise UsageError(f"{out} exists; give another --out")
    trained = load_model(source)
    models.to_tarflow(out, trained.flow, trained.variables)
    print(f"step {trained.step} of {source}: {out}")
    return 0
