"""`jetflow sample --mode …`: reconstructions, interpolations, and the image block by block."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image

from jetflow.cli import commands
from jetflow.cli.commands import sampling
from jetflow.data import dataset as pipeline
from jetflow.flows.labels import check_labels
from jetflow.model import Model
from jetflow.noise import Purpose, key_for
from jetflow.pictures import rows_by_class
from jetflow.sampling import explore
from jetflow.sampling.ancestral import Drawn, check_guided
from jetflow.training.log import make_grid, save_gif, save_png
from jetflow.types import UsageError

MODES = ("reconstruct", "interpolate", "trace")
LARGEST_STRIP = 17  # stages of a trace that are shown


def define(values: flags.FlagValues) -> None:
    flag = commands.definer(values)
    flag(flags.DEFINE_enum, "mode", "samples", "samples; reconstruct: images encoded and decoded "
         "again, above and below; interpolate: a path through latent space between two images or "
         "samples; trace: samples after each block, noise to picture",
         enum_values=["samples", *MODES])  # fmt: skip
    flag(flags.DEFINE_list, "images", None, "picture files for reconstruct (default: the first of "
         "the test split) and interpolate (default: two samples)")  # fmt: skip


def run(values: flags.FlagValues, model: Model, mesh: Mesh) -> int:
    """Raises a UsageError on flags that the mode does not have, or pictures that do not fit."""
    if values.npz:
        raise UsageError(f"--npz is for samples, not for --mode {values.mode}; leave it out")
    if values.images and values.mode == "trace":
        raise UsageError("--images is for reconstruct and interpolate; leave it out")
    if values.mode == "reconstruct":
        for name in ("guidance", "denoise", "temperature"):
            if values[name].value != values[name].default:
                raise UsageError(
                    f"--{name} is for samples; a reconstruction is the inverse alone: leave it out"
                )
    mode = {"reconstruct": _reconstruct, "interpolate": _interpolate, "trace": _trace}
    frames, rows = mode[values.mode](values, model, mesh)
    out = Path(values.out)
    if out.suffix == ".gif":
        save_gif(out, [make_grid(frame, [len(frame)]) for frame in frames])
    else:
        save_png(out, make_grid(np.concatenate(frames), rows))
    print(f"{values.mode} of step {model.step}: {out}")
    return 0


def _reconstruct(values, model: Model, mesh: Mesh):
    """Two frames: the originals, and what is decoded from their latents."""
    images, labels = _given_images(values, model, values.num or 8)
    label = check_labels(model.flow, labels, len(images))
    sampler = sampling.sampler(values, model, mesh, len(images))
    kind = model.config["noise"]["kind"]
    parts = []
    for part, of_part in _batches(values, label, len(images)):
        z = explore.encode(sampler, images[part], of_part, kind)
        parts.append(sampler.decode(z, of_part))
    commands.complain(np.concatenate([drawn.finite for drawn in parts]))
    pixels = np.concatenate([drawn.pixels for drawn in parts])
    error = pixels - (images + explore.centre(kind))
    print(
        f"error of {len(images)} reconstructions, in pixel values 0..255: "
        f"largest {np.abs(error).max():.1e}, root mean square {np.sqrt((error**2).mean()):.1e}"
    )
    decoded = np.concatenate([drawn.images(kind) for drawn in parts])
    return [images, decoded], [len(images)] * 2


def _interpolate(values, model: Model, mesh: Mesh):
    """A frame a point of the path."""
    num = values.num or 8
    sampler = sampling.sampler(values, model, mesh, num)
    label = check_labels(model.flow, values.label, num)
    check_guided(sampler.guidance, label)
    kind = model.config["noise"]["kind"]
    if values.images:
        images, _ = _given_images(values, model, 2)
        ends = explore.encode(sampler, images, None if label is None else label[:2], kind)
    else:
        ends = sampler.latents(key_for(values.seed, 0, Purpose.SAMPLE), np.arange(2))
    path = explore.interpolate(ends[0], ends[1], num)
    parts = [sampler.decode(path[part], of_part) for part, of_part in _batches(values, label, num)]
    commands.complain(np.concatenate([drawn.finite for drawn in parts]))
    return list(np.concatenate([drawn.images(kind) for drawn in parts])[:, None]), [num]


def _trace(values, model: Model, mesh: Mesh):
    """A frame a stage, of the images that plain sampling gives; in the picture, a row an image."""
    num = values.num or 8
    sampler = sampling.sampler(values, model, mesh, num)
    labels, _ = rows_by_class(num, model.flow.num_classes)
    label = check_labels(model.flow, labels if values.label is None else values.label, num)
    check_guided(sampler.guidance, label)
    z = sampler.latents(key_for(values.seed, 0, Purpose.SAMPLE), np.arange(num))
    stages = np.concatenate(
        [
            explore.trace(sampler, z[part], of_part)
            for part, of_part in _batches(values, label, num)
        ],
        axis=1,
    )
    commands.complain(np.isfinite(stages[-1]).all(axis=(1, 2, 3)))
    chosen = np.linspace(0, len(stages) - 1, min(len(stages), LARGEST_STRIP)).round().astype(int)
    kind = model.config["noise"]["kind"]
    frames = np.stack([Drawn(stages[stage]).images(kind) for stage in chosen])
    if Path(values.out).suffix == ".gif":
        return list(frames), []
    return list(frames.swapaxes(0, 1)), [len(chosen)] * num


def _batches(values, label, num: int) -> Iterator[tuple[slice, Any]]:
    """Which of `num` images are computed at a time, and their labels."""
    size = min(values.batch_size, num)
    for start in range(0, num, size):
        part = slice(start, start + size)
        yield part, None if label is None else label[part]


def _given_images(values, model: Model, num: int) -> tuple[UInt8[np.ndarray, "N H W C"], Any]:
    """The pictures of --images, or the first of the test split; with their labels."""
    if values.images:
        images = _read(values.images, model.flow.image_shape)
        if values.mode == "interpolate" and len(images) != 2:
            raise UsageError(f"--images names {len(images)} pictures; interpolate needs two")
        return images, values.label
    data = model.config["data"]
    dataset = pipeline.load(data["name"], data["test_split"], data_dir=values.data_dir)
    batch = next(pipeline.eval_batches(dataset, batch_size=min(num, len(dataset))))
    return batch.image, batch.label if model.flow.num_classes else None


def _read(paths: Sequence[str], shape: tuple[int, int, int]) -> UInt8[np.ndarray, "N H W C"]:
    height, width, channels = shape
    images = []
    for path in paths:
        try:
            picture = Image.open(path).convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise UsageError(f"--images has {path}, not a readable picture ({error})") from error
        if picture.size != (width, height):
            raise UsageError(
                f"--images has {path} of {picture.size[0]}x{picture.size[1]} pixels; this flow "
                f"needs {width}x{height}: scale or crop it"
            )
        images.append(np.asarray(picture).reshape(shape))
    return np.stack(images)
