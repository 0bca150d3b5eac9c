"""The metrics of `jetflow evaluate` that need no samples: likelihoods, and labels by them."""

import dataclasses
import math

import grain

from jetflow.cli.commands.evaluate.evaluation import Evaluation, Outcome
from jetflow.data import dataset as pipeline
from jetflow.evals import classify
from jetflow.evals import likelihoods as bpd
from jetflow.evals.records import finite, number
from jetflow.noise import Noise
from jetflow.types import UsageError


def dequantised(evaluation: Evaluation) -> list[Outcome]:
    """Bits per dimension of dequantised images."""
    return _bits(evaluation, bpd.UNIFORM)


def noised(evaluation: Evaluation) -> list[Outcome]:
    """Bits per dimension of images with the gaussian noise of training."""
    return _bits(evaluation, _gaussian(evaluation))


def dequantised_gap(evaluation: Evaluation) -> list[Outcome]:
    """How much worse held-out images are coded than those of the training."""
    return _gap(evaluation, bpd.UNIFORM)


def noised_gap(evaluation: Evaluation) -> list[Outcome]:
    """The same of noised images."""
    return _gap(evaluation, _gaussian(evaluation))


def accuracy(evaluation: Evaluation) -> list[Outcome]:
    """How often the label under which an image is most likely is its own."""
    model, values = evaluation.model, evaluation.values
    if not model.flow.num_classes:
        raise UsageError("accuracy is for flows with labels; leave it out of --metrics")
    noise = evaluation.classifier_noise
    measured = classify.measure(
        model.flow, model.variables, evaluation.held_out, mesh=evaluation.mesh, noise=noise,
        seed=values.seed, draws=evaluation.draws, batch_size=values.batch_size,
    )  # fmt: skip
    result = classify.record(measured, noise, evaluation.held_out, **evaluation.source)
    return [Outcome(result, classify.describe(result), evaluation.likelihood_suffix())]


def _gaussian(evaluation: Evaluation) -> Noise:
    noise = evaluation.trained_with
    if noise.kind == "uniform":
        raise UsageError(
            "noised_bpd is for flows trained with gaussian noise, and so is noised_bpd_gap; use bpd"
        )
    return noise


def _measure(evaluation: Evaluation, dataset: pipeline.Dataset, noise: Noise) -> bpd.Likelihood:
    model, values = evaluation.model, evaluation.values
    return bpd.measure(
        model.flow, model.variables, dataset, mesh=evaluation.mesh, noise=noise, seed=values.seed,
        draws=evaluation.draws, batch_size=values.batch_size,
    )  # fmt: skip


def _bits(evaluation: Evaluation, noise: Noise) -> list[Outcome]:
    likelihood = _measure(evaluation, evaluation.held_out, noise)
    result = bpd.record(likelihood, noise, evaluation.held_out, **evaluation.source)
    return [Outcome(result, bpd.describe(result), evaluation.likelihood_suffix())]


def _gap(evaluation: Evaluation, noise: Noise) -> list[Outcome]:
    """Held-out bits less those of as many training images, at even distances over the split."""
    held_out = evaluation.held_out
    trained_on = _spread(evaluation.load(evaluation.model.config["data"]["train_split"]), held_out)
    there, here = (_measure(evaluation, data, noise) for data in (held_out, trained_on))
    result = {
        "metric": f"{bpd.metric_name(noise)}_gap",
        "value": finite(there.mean - here.mean),
        "standard_error": finite(math.hypot(there.error_over_examples, here.error_over_examples)),
        "held_out": finite(there.mean),
        "train": finite(here.mean),
        "draws": evaluation.draws,
        "conditional": there.conditional,
        "noise": {"kind": noise.kind, "std": noise.std},
        "data": held_out.facts(),
        "train_data": trained_on.facts(),
        **evaluation.source,
    }
    text = (
        f"{result['metric']} {number(result)} (standard error over examples): {there.mean:.4f} on "
        f"{held_out.describe()}; {here.mean:.4f} on {trained_on.describe()}"
    )
    return [Outcome(result, text, evaluation.likelihood_suffix())]


def _spread(dataset: pipeline.Dataset, like: pipeline.Dataset) -> pipeline.Dataset:
    """As many examples of a split as `like` has, if it has so many, at even distances."""
    step = max(1, len(dataset) // len(like))
    end = min(step * len(like), len(dataset))
    some = grain.MapDataset.source(dataset.source)[:end:step]
    name = f"{dataset.split}[:{end}:{step}]"
    # What was taken when the data was prepared is of the whole split.
    return dataclasses.replace(dataset, split=name, source=some, known_checksum=None)
