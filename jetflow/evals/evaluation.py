"""What a trained flow is worth: `evaluate` measures it and writes JSON into its workdir."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jetflow import sharding
from jetflow.data.dataset import Dataset, eval_batches
from jetflow.evals import classify, likelihoods
from jetflow.evals.quality import Quality, drawn_batches
from jetflow.evals.records import finite, record
from jetflow.evals.settings import DISTANCES, EvaluateOptions, run_data, source
from jetflow.noise import Noise
from jetflow.types import TrainedFlow, UsageError
from jetflow.workdir import suffix, write_result


def evaluate(model: TrainedFlow, options: EvaluateOptions) -> list[dict[str, Any]]:
    """The records of all metrics, which are also written beside the checkpoint.

    Each has "metric", "value", "standard_error" and all that the value depends on.

    Raises:
        UsageError: on what this flow, its data or the reference do not have, before samples are
            drawn.
    """
    if options.make_reference:
        Quality(model, options).make_reference()
    return [result for result, _ in results(model, options)]


def results(model: TrainedFlow, options: EvaluateOptions) -> Iterator[tuple[dict[str, Any], Path]]:
    """The records of `evaluate` with their files, each as soon as it is measured."""
    sharding.check_batch("batch_size", options.batch_size, model.mesh)
    metrics, quality = options.measured(), Quality(model, options)
    quality.check(metrics)
    for metric in metrics:
        if metric in DISTANCES:
            measured, ending = quality.measure(metric), quality.suffix()
        elif metric == "sample_accuracy":
            measured = [_sample_accuracy(model, options)]
            ending = suffix(options.changed_sampling() | _changed(model, options, "draws"), {})
        else:
            measured = [_of_images(metric, model, options)]
            ending = suffix(_changed(model, options, "split", "draws", "seed"), {})
        for result in measured:
            yield result, write_result(model.workdir, result, ending)


def _changed(model: TrainedFlow, options: EvaluateOptions, *names: str) -> dict[str, Any]:
    """The options that differ from those of the evaluations during the training of the flow."""
    config = model.config
    defaults = {"split": config["data"]["test_split"], "draws": config["eval"]["draws"]}
    return {
        name: value
        for name, value in options.changed(*names).items()
        if value != defaults.get(name)
    }


def _draws(model: TrainedFlow, options: EvaluateOptions) -> int:
    return options.draws or model.config["eval"]["draws"]


def _of_images(metric: str, model: TrainedFlow, options: EvaluateOptions) -> dict[str, Any]:
    """The record of a metric that needs no samples."""
    split = options.split or model.config["data"]["test_split"]
    held_out = run_data(model, split, options.data_dir)
    if metric == "accuracy":
        return _accuracy(model, options, held_out)
    noise = likelihoods.UNIFORM
    if metric.startswith("noised_"):
        noise = model.noise
        if noise.kind == "uniform":
            raise UsageError(
                f"{metric} is for flows trained with gaussian noise; use "
                f"{metric.removeprefix('noised_')}"
            )
    if metric.endswith("_gap"):
        return _gap(model, options, held_out, noise)
    likelihood = _likelihood(model, options, held_out, noise)
    return likelihoods.record(likelihood, noise, held_out, **source(model))


def _likelihood(
    model: TrainedFlow, options: EvaluateOptions, dataset: Dataset, noise: Noise
) -> likelihoods.Likelihood:
    return likelihoods.measure(
        model.flow, model.variables, dataset, mesh=model.mesh, noise=noise, seed=options.seed,
        draws=_draws(model, options), batch_size=options.batch_size,
    )  # fmt: skip


def _gap(
    model: TrainedFlow, options: EvaluateOptions, held_out: Dataset, noise: Noise
) -> dict[str, Any]:
    """Held-out bits minus those of equally many training images."""
    train_split = model.config["data"]["train_split"]
    trained_on = spread(run_data(model, train_split, options.data_dir), len(held_out))
    test, train = (_likelihood(model, options, data, noise) for data in (held_out, trained_on))
    return record(
        f"{likelihoods.metric_name(noise)}_gap",
        test.mean - train.mean,
        math.hypot(test.error_over_examples, train.error_over_examples),
        held_out=finite(test.mean),
        train=finite(train.mean),
        draws=len(test.bits),
        conditional=test.conditional,
        noise={"kind": noise.kind, "std": noise.std},
        data=held_out.facts(),
        train_data=trained_on.facts(),
        **source(model),
    )


def spread(dataset: Dataset, count: int) -> Dataset:
    """So many examples of a split, if it has them, at even distances."""
    step = max(1, len(dataset) // count)
    end = min(step * count, len(dataset))
    some = grain.MapDataset.source(dataset.source)[:end:step]
    name = f"{dataset.split}[:{end}:{step}]"
    # The checksum that was taken when the data was prepared is of the whole split.
    return dataclasses.replace(dataset, split=name, source=some, known_checksum=None)


def _accuracy(model: TrainedFlow, options: EvaluateOptions, held_out: Dataset) -> dict[str, Any]:
    """How often the label under which an image is most likely is its own."""
    rows = sharding.local_rows(model.mesh, options.batch_size)
    batches = eval_batches(held_out, batch_size=options.batch_size, rows=rows)
    facts = {"data": held_out.facts()}
    return _classified("accuracy", model, options, batches, len(held_out), facts)


def _sample_accuracy(model: TrainedFlow, options: EvaluateOptions) -> dict[str, Any]:
    """How often a sample is most likely, to the flow itself, under the label it was drawn with."""
    num = options.num_samples
    facts = {"samples": {"images": num, **options.sampling(model)}}
    batches = drawn_batches(model, options)
    return _classified("sample_accuracy", model, options, batches, num, facts)


def _classified(
    metric: str, model: TrainedFlow, options: EvaluateOptions, batches, num: int, facts
) -> dict[str, Any]:
    if not model.flow.num_classes:
        raise UsageError(f"{metric} is for flows with labels; leave it out of metrics")
    noise = dataclasses.replace(model.noise, label_drop=0.0, flip=False)
    draws = _draws(model, options)
    right = classify.answers(
        model.flow, model.variables, batches, num, mesh=model.mesh, noise=noise,
        seed=options.seed, draws=draws, batch_size=options.batch_size,
    )  # fmt: skip
    value = float(np.nansum(right) / num)
    return record(
        metric,
        value,
        math.sqrt(value * (1 - value) / num),  # as binomial
        draws=draws,
        not_finite=int(np.isnan(right).sum()),
        noise={"kind": noise.kind, "std": noise.std},
        **facts,
        **source(model),
    )
