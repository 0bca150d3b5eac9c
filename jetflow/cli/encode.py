"""`jetflow encode`: the latents of a data set, as arrays."""

import dataclasses
import itertools

import numpy as np

from jetflow import hosts
from jetflow.archive import Archive, Row
from jetflow.buckets import AnyPath, resolved
from jetflow.cli.flags import Command
from jetflow.evals.batching import Batching
from jetflow.evals.settings import run_data
from jetflow.files import check_writable
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import load_model
from jetflow.options import LARGEST_BATCH, DataOptions, option
from jetflow.sampling import latents
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.sharding import check_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeOptions(ModelOptions, DataOptions, hosts.ProcessOptions):
    """The options of `jetflow encode`."""

    workdir: AnyPath = option(help="the folder of the run", example="runs/NAME")
    out: AnyPath = option(
        help="the .npz to write: latents [N, T, D], log-determinants and labels [N]; if a kill "
        "cuts it short, the same command goes on",
        example="latents.npz",
    )
    data: str | None = option(None, "the data set; default: that of the run")
    split: str | None = option(None, "default: the test split of the run's config")
    noise_level: float | None = option(
        None, "that a noise-conditional flow is told; default: the training's largest", least=1e-6
    )
    batch_size: int = option(128, "images at a time", least=1, most=LARGEST_BATCH)

    def __post_init__(self):
        super().__post_init__()
        check_writable("out", self.out)


def run(options: EncodeOptions) -> None:
    """Encode each image, without a draw of the noise, in the order of the split."""
    model = load_model(options.workdir, options.step, read_mesh(options.mesh))
    check_batch("batch_size", options.batch_size, model.mesh)
    split = options.split or model.config["data"]["test_split"]
    dataset = run_data(model, split, options, options.data)
    settings = {"workdir": str(resolved(model.workdir)), "step": model.step}
    settings |= {"data": dataset.facts(), "batch_size": options.batch_size}
    settings |= {"noise_level": options.noise_level}
    rows: dict[str, Row] = {"labels": ((), np.int32), "logdet": ((), np.float32)}
    rows |= {"latents": (model.flow.latent_shape, np.float32)}
    archive: Archive | None = None

    def begin() -> int:
        nonlocal archive
        archive = Archive(options.out, num=len(dataset), rows=rows, settings=settings)
        return archive.done

    done = hosts.by_first(begin)
    sampler = model.sampler(SamplingOptions(noise_level=options.noise_level), options.batch_size)
    batching = Batching(model.mesh, options.batch_size)
    batches = itertools.islice(batching.of_data(dataset), done // options.batch_size, None)
    for (z, logdet), label, _ in batching.results(
        lambda batch: latents.encode_batch(sampler, batch, model.noise.kind),
        batches if done < len(dataset) else (),
        total=len(dataset),
        name="encoding",
        done=done,
    ):
        if archive is not None:
            archive.append(latents=z, logdet=logdet, labels=label)
    if archive is not None:
        archive.finish()
        print(f"latents of {dataset.describe()} under step {model.step}: {options.out}")


COMMAND = Command(
    "jetflow encode --workdir runs/digits --split train --out latents.npz", EncodeOptions, run
)
