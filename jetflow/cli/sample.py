"""`jetflow sample`: images from a trained flow, as a picture and as arrays."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from jetflow import hosts, pictures, rollcall
from jetflow.archive import Archive, Collected, Row, collect
from jetflow.buckets import AnyPath, resolved
from jetflow.cli.flags import Command
from jetflow.data import dataset as pipeline
from jetflow.data.source import entries
from jetflow.files import check_writable
from jetflow.flows.stack import check_labels
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import Model, load_model
from jetflow.noise import LARGEST_SEED, Purpose, key_for
from jetflow.options import LARGEST_BATCH, MOST_SAMPLES, DataOptions, option
from jetflow.sampling import latents
from jetflow.sampling.ancestral import Drawn, Sampler, draw_all, not_finite
from jetflow.sampling.decoding import check_guided
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.types import UsageError

SHOWN = pictures.MOST_ROWS**2  # samples in the picture of many; each class has its share of them
LARGEST_STRIP = 17  # stages of a trace that are shown
WITHOUT_EFFECT = {
    "samples": ("images",),
    "reconstruct": ("npz", "latents", "guidance", "denoise", "temperature"),
    "interpolate": ("npz", "latents"),
    "trace": ("npz", "latents", "images"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingOptions, ModelOptions, DataOptions, hosts.ProcessOptions):
    """The options of `jetflow sample`."""

    workdir: AnyPath = option(help="the folder of the run", example="runs/NAME")
    out: AnyPath = option(Path("grid.png"), "the picture to write; a .gif moves")
    npz: AnyPath | None = option(
        None,
        "also write the images, uint8 [N, H, W, C], and labels; if a kill cuts it short, the same "
        "command goes on",
    )
    latents: bool = option(False, "also write the latents of the images into the npz, float32")
    num: int | None = option(
        None, "number of images; default: 64, in other modes 8", least=1, most=MOST_SAMPLES
    )
    label: int | None = option(
        None, "class of all images, -1 for none; default: in turn, in --mode interpolate none"
    )
    seed: int = option(
        0, "image i depends on the seed, its label and i alone", least=0, most=LARGEST_SEED
    )
    batch_size: int = option(64, "images made at a time", least=1, most=LARGEST_BATCH)
    mode: str = option(
        "samples",
        "samples; reconstruct: images encoded and decoded again, above and below; interpolate: a "
        "path through latent space between two images or samples; trace: samples after each "
        "block, noise to picture",
        choices=("samples", "reconstruct", "interpolate", "trace"),
    )
    images: tuple[str, ...] = option(
        (),
        "picture files for reconstruct (default: the first of the test split) and interpolate "
        "(default: two samples)",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("out", "npz"):
            check_writable(name, getattr(self, name))
        suffixes = [".png"] if self.mode == "samples" else [".png", ".gif"]
        if self.out.suffix not in suffixes or self.out == self.npz:
            expected = " or ".join(f"NAME{suffix}" for suffix in suffixes)
            raise UsageError(f"out is {self.out}; expected {expected} in mode {self.mode}")
        for name in self.changed(*WITHOUT_EFFECT[self.mode]):
            raise UsageError(f"{name} has no effect in mode {self.mode}; leave it out")
        if self.latents and not self.npz:
            raise UsageError("latents have no file to go to; add npz")
        if self.mode == "interpolate" and len(self.images) not in (0, 2):
            raise UsageError(f"images names {len(self.images)} pictures; interpolate needs two")


def run(options: SampleOptions) -> None:
    model = load_model(options.workdir, options.step, read_mesh(options.mesh))
    num = options.num or (64 if options.mode == "samples" else 8)
    sampler = model.sampler(options, min(options.batch_size, num))
    if options.mode == "samples":
        _draw(options, model, sampler, num)
        return
    mode = {"reconstruct": _reconstruct, "interpolate": _interpolate, "trace": _trace}
    stages = mode[options.mode](options, model, sampler, num)
    _complain(stages[-1].finite)
    frames = np.stack([stage.images(model.noise.kind) for stage in stages])
    if options.mode == "interpolate":
        frames = frames.swapaxes(0, 1)  # an image a frame
    if options.out.suffix == ".gif":
        pictures.save_gif(options.out, [pictures.strips(frame[None]) for frame in frames])
    else:
        rows = frames if options.mode == "reconstruct" else frames.swapaxes(0, 1)
        pictures.save_png(options.out, pictures.strips(rows))
    print(f"{options.mode} of step {model.step}: {options.out}")


def _draw(options: SampleOptions, model: Model, sampler: Sampler, num: int) -> None:
    """Samples to a picture, and to an .npz if one is asked for."""
    label = _labels(options, model, num)
    check_guided(sampler.guidance, label)
    archive: Archive | None = None

    def begin() -> int:
        nonlocal archive
        archive = _archive(options, model, num)
        return archive.done

    start, clock = hosts.by_first(begin) if options.npz else 0, time.perf_counter()
    if start:
        print(f"going on after {start:,} images of {options.npz}.partial")
    elif options.npz and options.npz.exists():
        print(f"{options.npz} is already there; the images are drawn again, and replace it")
    rollcall.reach("drawing samples")
    key, size = key_for(options.seed, 0, Purpose.SAMPLE), options.batch_size
    batches = draw_all(sampler, key, num=num, label=label, batch_size=size, start=start)
    drawn = collect(batches, model.noise.kind, num=num, keep=SHOWN, archive=archive)
    if num > start:
        _report(sampler, drawn)
        print(f"{(num - start) / (time.perf_counter() - clock):,.2f} images/s, with compilation")
    if not hosts.is_first():
        return  # without the archive, and so without the images before a kill
    _complain(drawn.finite)
    grid = pictures.samples_grid(drawn.images, None if label is None else label[:SHOWN])
    pictures.save_png(options.out, grid)
    print(f"{num:,} samples of step {model.step}: {options.out}")
    if archive is not None:
        archive.finish(label)
        print(f"the same as arrays: {options.npz}")


def _archive(options: SampleOptions, model: Model, num: int) -> Archive:
    """The .npz, begun or taken up again, with all that its images depend on."""
    settings = {"workdir": str(resolved(model.workdir)), "step": model.step}
    settings |= {"label": options.label, "seed": options.seed} | options.used(model.noise)
    assert options.npz is not None
    rows: dict[str, Row] = {"finite": ((), bool)}
    rows |= {"latents": (model.flow.latent_shape, np.float32)} if options.latents else {}
    rows |= {"images": (model.flow.image_shape, entries(model.flow.image_shape).type)}
    settings |= {"latents": True} if options.latents else {}
    return Archive(options.npz, num=num, rows=rows, settings=settings)


def _labels(options: SampleOptions, model: Model, num: int) -> Int[np.ndarray, "N"] | None:
    if options.label is None:
        return pictures.labels_in_turn(num, model.flow.num_classes)
    return np.asarray(check_labels(model.flow, options.label, num))


def _report(sampler: Sampler, drawn: Collected) -> None:
    """Print what the decoding by windows took."""
    if any(decoding.window > 1 for decoding in sampler.decoding or ()):
        tokens = (sampler.flow.latent_shape[0] - 1) * len(drawn.sweeps)
        print(
            f"sweeps of the blocks: {', '.join(map(str, drawn.sweeps))}, at most; "
            f"{sum(drawn.sweeps) / tokens:.0%} of the {tokens:,} evaluations token by token; "
            f"largest residual {drawn.residual:.1e}"
        )


def _reconstruct(options: SampleOptions, model: Model, sampler: Sampler, num: int) -> list[Drawn]:
    """The originals, and what is decoded from their latents."""
    if options.images:
        images = pictures.read_pictures(options.images, model.flow.image_shape)
        label = check_labels(model.flow, options.label, len(images))
    else:
        data = model.config["data"]
        dataset = pipeline.load(data["name"], data["test_split"], **options.data_fields)
        batch = next(pipeline.eval_batches(dataset, batch_size=min(num, len(dataset))))
        images, label = batch.image, batch.label if model.flow.num_classes else None
    z, _ = latents.encode(sampler, images, label, model.noise.kind, options.batch_size)
    drawn = latents.decode(sampler, z, label, options.batch_size)
    centre = images + latents.centre(model.noise.kind)
    error = drawn.pixels - centre
    print(
        f"error of {len(images)} reconstructions, in the units of the data: "
        f"largest {np.abs(error).max():.1e}, root mean square {np.sqrt((error**2).mean()):.1e}"
    )
    return [Drawn(centre), drawn]


def _interpolate(options: SampleOptions, model: Model, sampler: Sampler, num: int) -> list[Drawn]:
    """The points of the path."""
    label = check_labels(model.flow, options.label, num)
    check_guided(sampler.guidance, label)
    if options.images:
        images = pictures.read_pictures(options.images, model.flow.image_shape)
        of_ends = None if label is None else label[:2]
        ends, _ = latents.encode(sampler, images, of_ends, model.noise.kind)
    else:
        ends = sampler.latents(key_for(options.seed, 0, Purpose.SAMPLE), np.arange(2))
    path = latents.interpolate(ends[0], ends[1], num)
    return [latents.decode(sampler, path, label, options.batch_size)]


def _trace(options: SampleOptions, model: Model, sampler: Sampler, num: int) -> list[Drawn]:
    """Stages of the images that plain sampling gives."""
    label = _labels(options, model, num)
    check_guided(sampler.guidance, label)
    z = sampler.latents(key_for(options.seed, 0, Purpose.SAMPLE), np.arange(num))
    stages = latents.trace(sampler, z, label, options.batch_size)
    shown = np.linspace(0, len(stages) - 1, min(len(stages), LARGEST_STRIP)).round().astype(int)
    return [Drawn(stages[stage]) for stage in shown]


def _complain(finite: Bool[np.ndarray, "N"]) -> None:
    """Tell a person of images that are not finite."""
    if complaint := not_finite(finite):
        hosts.note(f"jetflow: {complaint}")


COMMAND = Command(
    "jetflow sample --workdir runs/digits --num 64 --guidance 1 --denoise --out grid.png",
    SampleOptions,
    run,
)
