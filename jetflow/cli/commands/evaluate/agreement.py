"""The metric `sample_accuracy` of `jetflow evaluate`: whether samples look like their labels."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from jetflow import sharding
from jetflow.cli.commands import sampling
from jetflow.cli.commands.evaluate.evaluation import Evaluation, Outcome
from jetflow.evals import classify
from jetflow.evals.features import in_batches
from jetflow.evals.records import number
from jetflow.pictures import labels_in_turn
from jetflow.types import Batch, UsageError
from jetflow.workdir import suffix


def sample_accuracy(evaluation: Evaluation) -> list[Outcome]:
    """How often a sample is most likely, to the flow itself, under the label it was drawn with."""
    model, values = evaluation.model, evaluation.values
    if not model.flow.num_classes:
        raise UsageError("sample_accuracy is for flows with labels; leave it out of --metrics")
    noise = evaluation.classifier_noise
    found = classify.measure_batches(
        model.flow, model.variables, _batches(evaluation), values.num_samples,
        mesh=evaluation.mesh, noise=noise, seed=values.seed, draws=evaluation.draws,
        batch_size=values.batch_size,
    )  # fmt: skip
    result = {
        "metric": "sample_accuracy",
        "value": found.value,
        "standard_error": found.standard_error,
        "draws": found.draws,
        "not_finite": found.not_finite,
        "noise": {"kind": noise.kind, "std": noise.std},
        "samples": {
            "images": values.num_samples,
            "seed": values.seed,
            **sampling.used(values, model),
        },
        **evaluation.source,
    }
    text = (
        f"sample_accuracy {number(result)} (standard error over {found.examples:,} samples), by "
        f"the flow's own likelihoods with {noise.kind} noise, mean of {found.draws} draws"
        f"{classify.broken(result)}"
    )
    own = {"draws": evaluation.draws}, {"draws": model.config["eval"]["draws"]}
    name = suffix(evaluation.drawn_settings | own[0], evaluation.drawn_defaults | own[1])
    return [Outcome(result, text, name)]


def _batches(evaluation: Evaluation) -> Iterator[Batch]:
    """Samples whose labels take turns, as this process's rows of batches."""
    size, classes = evaluation.values.batch_size, evaluation.model.flow.num_classes
    rows = sharding.local_rows(evaluation.mesh, size)
    for batch in in_batches(_images(evaluation), batch_size=size, rows=rows):
        yield batch._replace(label=(batch.index % classes).astype(np.int32))


def _images(evaluation: Evaluation) -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
    values, model = evaluation.values, evaluation.model
    num = values.num_samples
    sampler = sampling.sampler(values, model, evaluation.mesh, num)
    label = labels_in_turn(num, model.flow.num_classes)
    return (images for images, _ in sampling.draw(sampler, values, model, num=num, label=label))
