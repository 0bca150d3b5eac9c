"""`jetflow sample`: images from a trained flow, as a picture and as arrays."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jetflow import commands
from jetflow.evals.samples import rows_by_class, square_rows
from jetflow.noise import Purpose, key_for
from jetflow.report import make_grid, save_png
from jetflow.sampling.ancestral import quantise, sample_pixels
from jetflow.types import Guidance, UsageError
from jetflow.workdir import load_model

USAGE = "jetflow sample --workdir runs/digits --num 64 --guidance 1 --denoise --out grid.png"
ARGUMENTS = ()


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    commands.define_workdir(values)
    commands.define_step(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "out", "grid.png", "the picture to write")
    flag(flags.DEFINE_string, "npz", None, "also write the images, uint8 [N, H, W, C], and labels")
    flag(flags.DEFINE_integer, "num", 64, "number of images", lower_bound=1)
    flag(flags.DEFINE_integer, "label", None, "class of all images; default: one row a class")
    flag(flags.DEFINE_integer, "seed", 0, "image i depends on the seed and i alone", lower_bound=0)
    flag(flags.DEFINE_float, "temperature", 1.0, "of the prior: multiplies its standard deviation",
         lower_bound=0.0)  # fmt: skip
    flag(flags.DEFINE_float, "guidance", 0.0, "strength of guidance", lower_bound=0.0)
    flag(flags.DEFINE_string, "guide_what", "ab", "guide a (log-scale), b (shift), or ab (both)")
    flag(flags.DEFINE_float, "attention_temperature", 1.0,
         "of guidance's unconditional pass; must differ from 1 without labels")  # fmt: skip
    flag(flags.DEFINE_bool, "annealed", False, "let guidance grow from the first token to the last")
    flag(flags.DEFINE_bool, "denoise", False, "one denoising step, for gaussian training noise")
    flag(flags.DEFINE_integer, "batch_size", 64, "images made at a time", lower_bound=1)


def run(values: flags.FlagValues) -> int:
    model = load_model(Path(commands.required(values, "workdir", "runs/NAME")), values.step)
    noise = model.config["noise"]
    if values.denoise and noise["kind"] != "gaussian":
        raise UsageError("--denoise needs a flow trained with gaussian noise; leave it out")
    for flag in ("out", "npz"):
        commands.check_writable(flag, values[flag].value)
    labels, rows = rows_by_class(values.num, model.flow.num_classes)
    if values.label is not None:
        labels, rows = values.label, square_rows(values.num)
    pixels = sample_pixels(
        model.flow,
        model.variables,
        key_for(values.seed, 0, Purpose.SAMPLE),
        num=values.num,
        label=labels,
        guidance=Guidance(
            values.guidance, values.guide_what, values.attention_temperature, values.annealed
        ),
        temperature=values.temperature,
        denoise=noise["std"] if values.denoise else 0.0,
        batch_size=values.batch_size,
    )
    broken = int((~np.isfinite(pixels)).any(axis=(1, 2, 3)).sum())
    if broken:
        print(f"jetflow: {broken} of {values.num} images are not finite", file=sys.stderr)
    images = quantise(pixels, noise["kind"])
    save_png(Path(values.out), make_grid(images, rows))
    print(f"{values.num} samples of step {model.step}: {values.out}")
    if values.npz:
        named: dict[str, Any] = {"images": images}
        if labels is not None:
            named["labels"] = np.broadcast_to(labels, (values.num,))
        Path(values.npz).parent.mkdir(parents=True, exist_ok=True)
        with open(values.npz, "wb") as file:  # of a path, savez would add to the name
            np.savez_compressed(file, **named)
        print(f"the same as arrays: {values.npz}")
    return 0
