"""What a trained flow is worth: `evaluate` measures it and writes JSON into its workdir."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jetflow import sharding
from jetflow.buckets import AnyPath
from jetflow.data.dataset import Dataset
from jetflow.evals import likelihoods
from jetflow.evals.batching import Batching
from jetflow.evals.features import checksum
from jetflow.evals.likelihoods import Density, Likelihood
from jetflow.evals.quality import Quality
from jetflow.evals.records import finite, record
from jetflow.evals.settings import DISTANCES, EvaluateOptions, TrainedFlow, run_data, source
from jetflow.files import if_possible
from jetflow.noise import NOISY, Noise
from jetflow.types import UsageError
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


def results(
    model: TrainedFlow, options: EvaluateOptions
) -> Iterator[tuple[dict[str, Any], AnyPath | None]]:
    """The records of `evaluate`, each as soon as it is measured, and its file if it has one."""
    sharding.check_batch("batch_size", options.batch_size, model.mesh)
    quality, likelihood = Quality(model, options), _Likelihoods(model, options)
    metrics = options.measured()
    quality.check(metrics)
    likelihood.check(metrics)
    for metric in metrics:
        if metric in DISTANCES:
            measured, ending = quality.measure(metric), quality.suffix()
        else:
            measured, ending = likelihood.measure(metric), likelihood.suffix(metric)
        for result in measured:
            path, level = None, likelihood.level(result)
            with if_possible("the result"):
                path = write_result(model.workdir, result, ending + level)
            yield result, path


@dataclasses.dataclass(frozen=True, eq=False)
class _Likelihoods:
    """The metrics that need no reference."""

    model: TrainedFlow
    options: EvaluateOptions
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def draws(self) -> int:
        return self.options.draws or self.model.config["eval"]["draws"]

    @property
    def split(self) -> str:
        return self.options.split or self.model.config["data"]["test_split"]

    def suffix(self, metric: str) -> str:
        """What the file's name ends in: options that differ from those of the training."""
        config, options = self.model.config, self.options
        settings, defaults = {"draws": self.draws}, {"draws": config["eval"]["draws"]}
        if metric == "sample_accuracy":
            given = {"samples": checksum(options.samples)} if options.samples else {}
            return suffix(settings | (given or options.changed_sampling()), defaults)
        defaults |= {"split": config["data"]["test_split"], "seed": 0}
        return suffix(settings | {"split": self.split, "seed": options.seed}, defaults)

    def check(self, metrics: tuple[str, ...]) -> None:
        """Raises a UsageError if levels are given that no metric is measured at."""
        levels = self.options.levels
        if levels and self.model.noise.kind != "levels":
            raise UsageError(
                f"levels is {levels}, which is for flows trained with noise of all levels"
            )
        if levels and not any("noised_" in name or "accuracy" in name for name in metrics):
            raise UsageError(
                f"levels is {levels}, on which {', '.join(metrics) or 'a reference'} does not "
                "depend; add noised_bpd or accuracy to metrics"
            )

    def measure(self, metric: str) -> Iterator[dict[str, Any]]:
        """The records of a metric: one, or one a level of noise."""
        noise, levels = self.model.noise, self.options.levels
        if "accuracy" in metric:
            yield self._accuracy(metric)
            return
        noises = [noise.of_data(self.model.flow.image_shape)]
        if metric.startswith("noised_"):
            if noise.kind not in NOISY:
                plain = metric.removeprefix("noised_")
                raise UsageError(f"{metric} is for flows trained with gaussian noise; use {plain}")
            noises = [noise.at(level) for level in levels] if levels else [noise]
        for noise in noises:
            yield self._likelihood(metric, noise)

    def level(self, result: dict[str, Any]) -> str:
        """What the file's name ends in, where a record is of one level of noise."""
        noise = result.get("noise", {})
        is_one = self.options.levels and noise.get("kind") == "levels"
        return f"-level={noise['t0']:g}" if is_one else ""

    def _likelihood(self, metric: str, noise: Noise) -> dict[str, Any]:
        held_out, density = self._data(self.split), self._density(noise)
        test = density.likelihood(held_out)
        if not metric.endswith("_gap"):
            return test.record(**source(self.model))
        trained_on = spread(self._data(self.model.config["data"]["train_split"]), len(held_out))
        return self._gap(test, density.likelihood(trained_on))

    def _gap(self, test: Likelihood, train: Likelihood) -> dict[str, Any]:
        """Held-out bits minus those of equally many training images."""
        error = math.hypot(test.error_over_examples, train.error_over_examples)
        facts: dict[str, Any] = {"held_out": finite(test.mean), "train": finite(train.mean)}
        facts |= {"draws": self.draws, "conditional": test.conditional}
        facts |= {"noise": likelihoods.noise_facts(test.noise)}
        facts |= {"data": test.data.facts(), "train_data": train.data.facts()}
        metric = f"{likelihoods.metric_name(test.noise)}_gap"
        return record(metric, test.mean - train.mean, error, **facts, **source(self.model))

    def _accuracy(self, metric: str) -> dict[str, Any]:
        """How often the label under which an image is most likely is its own."""
        model, options = self.model, self.options
        if not model.flow.num_classes:
            raise UsageError(f"{metric} is for flows with labels; leave it out of metrics")
        noise = dataclasses.replace(model.noise, label_drop=0.0, flip=False)
        if noise.kind == "levels":
            noise = noise.at((options.levels or (math.sqrt(noise.t0 * noise.t1),))[0])
        density = self._density(noise)
        if metric == "sample_accuracy":
            quality = Quality(model, options)
            num, batches = quality.count_samples(), quality.labelled()
            facts: dict[str, Any] = {"samples": quality.facts_of_samples()}
        else:
            held_out = self._data(self.split)
            num, batches = len(held_out), density.batching.of_data(held_out)
            facts = {"data": held_out.facts()}
        answers = density.answers(batches, num, by_gradient=metric.endswith("gradient"))
        value = float(answers.right.mean())
        error = math.sqrt(value * (1 - value) / num)  # as binomial
        facts |= {"draws": self.draws, "not_finite": int((answers.answer < 0).sum())}
        if metric != "sample_accuracy":
            self.answers[metric] = answers.answer
            if len(self.answers) == 2:  # of Bayes' rule and of the gradient
                facts["agreement"] = float(np.equal(*self.answers.values()).mean())
        facts |= {"noise": likelihoods.noise_facts(density.noise)}
        return record(metric, value, error, **facts, **source(model))

    def _density(self, noise: Noise) -> Density:
        batching = Batching(self.model.mesh, self.options.batch_size)
        return Density(
            self.model.flow, self.model.variables, batching, noise, self.options.seed, self.draws
        )

    def _data(self, split: str) -> Dataset:
        return run_data(self.model, split, self.options)


def spread(dataset: Dataset, count: int) -> Dataset:
    """So many examples of a split, if it has them, at even distances."""
    step = max(1, len(dataset) // count)
    end = min(step * count, len(dataset))
    some = grain.MapDataset.source(dataset.source)[:end:step]
    name = f"{dataset.split}[:{end}:{step}]"
    # The checksum that was taken when the data was prepared is of the whole split.
    return dataclasses.replace(dataset, split=name, source=some, known_checksum=None)
