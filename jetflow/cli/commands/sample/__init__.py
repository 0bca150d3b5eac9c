"""`jetflow sample`: images from a trained flow, as a picture and as arrays."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from jetflow import hosts
from jetflow.archive import Archive
from jetflow.cli import commands
from jetflow.cli.commands import sampling
from jetflow.cli.commands.sample import explore
from jetflow.flows.labels import check_labels
from jetflow.model import Model, load_model
from jetflow.noise import LARGEST_SEED
from jetflow.pictures import corner, rows_by_class, square_rows
from jetflow.sampling.ancestral import Sampler
from jetflow.training.log import make_grid, save_png
from jetflow.types import UsageError

USAGE = "jetflow sample --workdir runs/digits --num 64 --guidance 1 --denoise --out grid.png"
ARGUMENTS = ()


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    commands.define_workdir(values)
    commands.define_step(values)
    commands.define_data_dir(values)
    commands.define_mesh(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_string, "out", "grid.png", "the picture to write")
    flag(flags.DEFINE_string, "npz", None, "also write the images, uint8 [N, H, W, C], and labels; "
         "if a kill cuts it short, the same command goes on")  # fmt: skip
    flag(flags.DEFINE_integer, "num", None, "number of images; default: 64, in other modes 8",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_integer, "label", None, "class of all images, -1 for none; default: "
         "one row a class, in --mode interpolate none")  # fmt: skip
    flag(flags.DEFINE_integer, "seed", 0, "image i depends on the seed and i alone",
         lower_bound=0, upper_bound=LARGEST_SEED)  # fmt: skip
    flag(flags.DEFINE_integer, "batch_size", 64, "images made at a time", lower_bound=1)
    sampling.define(values)
    explore.define(values)


def run(values: flags.FlagValues) -> int:
    for name in ("out", "npz"):
        commands.check_writable(name, values[name].value)
    if values.mode == "samples" and values.out.endswith(".gif"):
        raise UsageError(f"--out is {values.out}, but samples do not move; give a .png")
    if values.mode == "samples" and values.images:
        raise UsageError("--images is for --mode reconstruct and interpolate; leave it out")
    if Path(values.out).suffix not in (".png", ".gif") or values.out == values.npz:
        raise UsageError(f"--out is {values.out}; expected a file NAME.png, or NAME.gif")
    workdir = Path(commands.required(values, "workdir", "runs/NAME"))
    mesh = commands.mesh(values)
    model = load_model(workdir, values.step, mesh)
    if values.mode != "samples":
        return explore.run(values, model, mesh)
    num = values.num or 64
    labels, rows = rows_by_class(num, model.flow.num_classes)
    if values.label is not None:
        labels = np.asarray(check_labels(model.flow, values.label, num))
        rows = square_rows(num)
    sampler = sampling.sampler(values, model, mesh, num)
    archive = _archive(values, model, num) if values.npz and hosts.is_first() else None
    images = _draw(sampler, values, model, labels, num, archive)
    if not hosts.is_first():
        return 0
    shown, rows = corner(rows)
    save_png(Path(values.out), make_grid(images(shown), rows))
    print(f"{num:,} samples of step {model.step}: {values.out}")
    if archive is not None:
        archive.finish(labels)
        print(f"the same as arrays: {values.npz}")
    return 0


def _archive(values: flags.FlagValues, model: Model, num: int) -> Archive:
    """The .npz, begun or taken up again with all that its images depend on."""
    settings = {"workdir": str(model.workdir.resolve()), "step": model.step}
    settings |= {name: values[name].value for name in ("label", "seed")}
    settings |= sampling.settings(values)
    return Archive(Path(values.npz), num=num, image_shape=model.flow.image_shape, settings=settings)


def _draw(sampler: Sampler, values, model: Model, labels, num: int, archive: Archive | None):
    """Draw the images; returns a function that gives those of some numbers."""
    kept, sweeps, residual = [], (), 0.0
    start = hosts.agreed(archive.done if archive else 0)
    finite = [archive.finite] if archive else []
    if start:
        print(f"going on behind {start:,} images of {values.npz}.partial")
    batches = sampling.draw(sampler, values, model, num=num, label=labels, start=start)
    clock = time.perf_counter()
    with tqdm(total=num, initial=start, unit=" images", disable=None, leave=False) as bar:
        for images, drawn in batches:
            finite.append(drawn.finite)
            if archive is not None:
                archive.append(images, drawn.finite)
            elif hosts.is_first():
                kept.append(images)
            sweeps = tuple(map(max, drawn.sweeps, sweeps or drawn.sweeps))
            residual = max(residual, drawn.residual)
            bar.update(len(images))
    if num > start:
        _report(sampler, sweeps, residual)
        print(f"{(num - start) / (time.perf_counter() - clock):,.2f} images/s, with compilation")
    commands.complain(np.concatenate(finite))
    if archive is not None:
        return archive.first
    return lambda index: np.concatenate(kept)[index]


def _report(sampler: Sampler, sweeps: tuple[int, ...], residual: float) -> None:
    """What the decoding by windows took."""
    if any(how.window > 1 for how in sampler.decoding or ()):
        tokens = (sampler.flow.latent_shape[0] - 1) * len(sweeps)
        print(
            f"sweeps of the blocks: {', '.join(map(str, sweeps))}, at most; "
            f"{sum(sweeps) / tokens:.0%} of the {tokens:,} evaluations token by token; "
            f"largest residual {residual:.1e}"
        )
