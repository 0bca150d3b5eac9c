"""What an evaluation is asked for: its metrics, the images, and how samples are drawn."""

import abc
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jetflow.buckets import AnyPath
from jetflow.data.dataset import Dataset, load
from jetflow.evals import inception
from jetflow.noise import LARGEST_SEED, Noise
from jetflow.options import LARGEST_BATCH, MOST_DRAWS, MOST_SAMPLES, DataOptions, option
from jetflow.sampling.ancestral import Drawn
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.types import Flow, UsageError

# Of real images.
LIKELIHOODS = ("bpd", "noised_bpd", "bpd_gap", "noised_bpd_gap", "accuracy", "accuracy_gradient")
NEIGHBOURS = {"kid": 1, "precision_recall": 3, "density_coverage": 5}  # that a feature must have
DISTANCES = ("fid", "sfid", *NEIGHBOURS)
METRICS = (*LIKELIHOODS, "sample_accuracy", *DISTANCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SamplingOptions, DataOptions):
    """What is measured, of which images, and how samples are drawn."""

    metrics: tuple[str, ...] | None = option(
        None,
        "what to measure; default: bpd. With noised_, the likelihood of images with the gaussian "
        "noise of training; with _gap, held-out minus training bits, on equally many images; "
        "accuracy and sample_accuracy: how often the flow's likelihoods tell the label of images, "
        "and of samples; accuracy_gradient: one gradient instead of a likelihood a class",
        choices=METRICS,
    )
    split: str | None = option(
        None, "of likelihoods and accuracy; default: the test split of the run's config"
    )
    draws: int | None = option(
        None, "noise draws an example; default: the run's", least=1, most=MOST_DRAWS
    )
    levels: tuple[float, ...] | None = option(
        None,
        "of noise, at each of which noised_bpd is measured, and accuracies at the first; default: "
        "the levels of training, drawn as there; for noise-conditional flows",
        least=1e-6,
    )
    seed: int = option(0, "of the draws, and of samples", least=0, most=LARGEST_SEED)
    batch_size: int = option(
        128, "images at a time; changes rounding errors alone", least=1, most=LARGEST_BATCH
    )
    num_samples: int = option(50_000, "images drawn", least=2, most=MOST_SAMPLES)
    samples: AnyPath | None = option(None, "an .npz of `jetflow sample` to take images from")
    reference: AnyPath | None = option(
        None, "an .npz of make_reference or of ADM's evaluator; default: that of make_reference"
    )
    make_reference: bool = option(
        False, "write statistics of real images to reference, by default in the run's evals folder"
    )
    reference_data: str | None = option(None, "of make_reference; default: the run's data set")
    reference_split: str | None = option(
        None, "default: the run's training split, which published references use"
    )
    inception_weights: Path | None = option(
        None, f"a file {inception.NAME}; default: it is downloaded once"
    )
    num_features: int = option(
        10_000, "images of each side that kid and the metrics by neighbours take", least=2
    )

    def measured(self) -> tuple[str, ...]:
        """The metrics, or the default ones."""
        if self.metrics is None:
            return () if self.make_reference else ("bpd",)
        return tuple(self.metrics)

    def changed_sampling(self) -> dict[str, Any]:
        """What samples depend on, but for the flow, as far as it is not as by default."""
        names = [field.name for field in dataclasses.fields(SamplingOptions)]
        return self.changed(*names, "num_samples", "seed")

    def sampling(self, model: "TrainedFlow") -> dict[str, Any]:
        """What samples depend on, but for the flow, for the record."""
        return self.used(model.noise) | {"num_samples": self.num_samples, "seed": self.seed}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedFlow(abc.ABC):
    """A flow at a checkpoint of its run, as a `jetflow.Model` is.

    Attributes:
        workdir: of the run.
        config: the resolved config of its training, a tree of plain values.
        flow, variables: the flow, with its averaged parameters where the run has them.
        step: of the checkpoint.
        mesh: the devices on which the variables lie.
        weights: which parameters of the training these are: "ema", averaged ones, or "params".
    """

    workdir: AnyPath
    config: dict[str, Any]
    flow: Flow
    variables: dict[str, Any]
    step: int
    mesh: Mesh
    weights: str

    @property
    def noise(self) -> Noise:
        """The noise of its training."""
        return Noise(**self.config["noise"])

    @abc.abstractmethod
    def draw(
        self, options: Any, *, num: int, label: Any, seed: int, batch_size: int, start: int = 0
    ) -> Iterator[Drawn]:
        """The images start, …, num − 1 in batches."""


def source(model: TrainedFlow) -> dict[str, Any]:
    """The weights that a result is of, for the record."""
    return {"step": model.step, "weights": model.weights}


def run_data(
    model: TrainedFlow, split: str, options: DataOptions, name: str | None = None
) -> Dataset:
    """A split of a data set, by default of that of a run.

    Raises:
        UsageError: if the run names none.
    """
    name = name or model.config["data"]["name"]
    if not name:
        raise UsageError(
            f"{model.workdir} names no data set; convert it again with --data NAME, to another "
            "--out"
        )
    return load(name, split, **options.data_fields)
