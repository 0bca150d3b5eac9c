"""The metrics of `jetflow evaluate` that compare samples with real images."""

import dataclasses
import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from absl import flags
from tqdm import tqdm

from jetflow import hosts, sharding
from jetflow.cli import commands
from jetflow.cli.commands import sampling
from jetflow.cli.commands.evaluate.drawn import DrawnSamples
from jetflow.cli.commands.evaluate.evaluation import Evaluation, Outcome
from jetflow.data import dataset as pipeline
from jetflow.evals import kid as kernel
from jetflow.evals import neighbours, reference, weights
from jetflow.evals.features import collect, finite_of, images_of, in_batches
from jetflow.evals.fid import Gaussian, frechet_distance
from jetflow.evals.records import finite, number
from jetflow.evals.statistics import Statistics
from jetflow.types import Batch, UsageError
from jetflow.workdir import suffix

NEIGHBOURS = {"kid": 1, "precision_recall": 3, "density_coverage": 5}  # that a feature must have


def define(values: flags.FlagValues) -> None:
    flag = commands.definer(values)
    flag(flags.DEFINE_integer, "num_samples", 50_000, "images drawn", lower_bound=2)
    flag(flags.DEFINE_string, "samples", None, "an .npz of `jetflow sample` to take images from")
    flag(flags.DEFINE_string, "reference", None, "an .npz of --make_reference or of ADM's evaluator"
         " to compare with; default: that of --make_reference")  # fmt: skip
    flag(flags.DEFINE_bool, "make_reference", False, "write statistics of real images to "
         "--reference, by default in the run's evals folder")  # fmt: skip
    flag(flags.DEFINE_string, "reference_data", None, "data set of --make_reference; default: "
         "the run's")  # fmt: skip
    flag(flags.DEFINE_string, "reference_split", None, "default: the run's training split, of which"
         " published references are")  # fmt: skip
    flag(flags.DEFINE_string, "inception_weights", None, f"a file {weights.NAME}; default: it is "
         "downloaded once")  # fmt: skip
    flag(flags.DEFINE_integer, "num_features", 10_000, "images, of the samples and of a reference, "
         "that kid and the metrics by neighbours take", lower_bound=2)  # fmt: skip
    sampling.define(values)


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """Samples and a reference, each computed once for all metrics."""

    evaluation: Evaluation
    needs_images: bool

    @functools.cached_property
    def network(self) -> weights.Network:
        return weights.load(self.evaluation.values.inception_weights)

    @functools.cached_property
    def reference(self) -> reference.Reference:
        path = self._reference_path
        if not path.exists():
            flag = "--reference" if self.evaluation.values.reference else "its default,"
            others = sorted(map(str, (self.evaluation.model.workdir / "evals").glob("reference-*")))
            found = f", such as {others[0]}" if others else ""
            raise UsageError(
                f"there is no reference, {flag} {path}; make it with `jetflow evaluate --workdir "
                f"{self.evaluation.model.workdir} --make_reference`, or give another --reference"
                + found
            )
        measure = functools.partial(self._measure, what="reference")
        size = self.evaluation.values.batch_size
        return reference.read(path, self.network, measure, chunk=size, images=self.needs_images)

    def check(self, metrics: Collection[str]) -> None:
        """Say what these metrics lack before any sample is drawn.

        Raises:
            UsageError: if the reference is missing, or not what they need, or features are too few.
        """
        values = self.evaluation.values
        for metric, which in (("fid", "pooled"), ("sfid", "spatial")):
            if metric in metrics:
                self.reference.gaussian(which)
        for metric in set(metrics) & set(NEIGHBOURS):
            neighbours.check_count(len(self.reference.some_features()), NEIGHBOURS[metric])
            made = values.num_samples
            if values.samples:
                made, _ = images_of(Path(values.samples), "samples", values.batch_size)
            neighbours.check_count(min(made, values.num_features), NEIGHBOURS[metric])

    @functools.cached_property
    def samples(self) -> tuple[Statistics, dict[str, Any]]:
        """Their statistics, and what is written of them."""
        values = self.evaluation.values
        if values.samples:
            path = Path(values.samples)
            count, chunks = images_of(path, "samples", values.batch_size)
            facts = {"file": str(path), "checksum": reference.checksum(path)}
            statistics = self._measure(chunks, count, what="samples")
            if (are_finite := finite_of(path)) is not None:
                statistics.broken = int((~are_finite).sum())
            return statistics, {"images": count, **facts}
        folder = self.evaluation.model.workdir / "evals"
        name = f"samples-{self.evaluation.model.step:08d}{self._sampling_suffix}.partial.npz"
        drawn = DrawnSamples(self.evaluation, self.network.sha256, folder / name)
        statistics = Statistics(values.num_samples, values.num_features)
        drawn.resume(statistics)
        batches = self._batches(drawn.chunks(statistics), start=statistics.done)
        after = drawn.saver(statistics)
        merged = self._collect(batches, statistics, values.num_samples, "samples", after)
        drawn.finish()
        classes = self.evaluation.model.flow.num_classes
        labels = "each equally often" if classes else None
        return merged, {"images": values.num_samples, "labels": labels, **drawn.settings}

    def make_reference(self) -> Path:
        """Write the reference file that the flags ask for."""
        values, path = self.evaluation.values, self._reference_path
        commands.check_writable("reference", str(path))
        if values.reference_data:
            data = pipeline.load(values.reference_data, self._split, data_dir=values.data_dir)
        else:
            data = self.evaluation.load(self._split)
        rows = sharding.local_rows(self.evaluation.mesh, values.batch_size)
        batches = pipeline.eval_batches(data, batch_size=values.batch_size, rows=rows)
        statistics = Statistics(len(data), values.num_features)
        merged = self._collect(batches, statistics, len(data), "reference")
        if hosts.is_first():
            reference.write(path, merged, self.network, data.facts())
        hosts.agreed(True)  # the others wait for the file
        hosts.wait_to_see(path)
        return path

    def outcome(self, metric: str, value: float, error: float | None = None, **facts) -> Outcome:
        """The record of a number, with everything that it depends on."""
        statistics, samples = self.samples
        there = self.reference.facts
        result = {
            "metric": metric,
            "value": finite(value),
            "standard_error": None if error is None else finite(error),
            **facts,
            "network": self.network.facts(),
            "samples": samples | {"not_finite": statistics.broken},
            "reference": there,
            **self.evaluation.source,
        }
        text = f"{metric} {number(result)} of {samples['images']:,} samples against {_named(there)}"
        if statistics.broken:
            text += f"\n  ({statistics.broken:,} samples are not finite, and compared all the same)"
        if not self.network.is_published:
            text += (
                f"\n  (weights {self.network.sha256[:8]}, not the published ones: comparable only "
                "with itself)"
            )
        return Outcome(result, text, self._suffix)

    @property
    def _suffix(self) -> str:
        """Of a result's name: without settings that are as by default."""
        values, extra = self.evaluation.values, {}
        if values.samples:
            extra["samples"] = self.samples[1]["checksum"]
        if values.reference or values.reference_data or values.reference_split:
            extra["reference"] = self.reference.facts["checksum"]
        if not self.network.is_published:
            extra["inception"] = self.network.sha256[:8]
        if values.num_features != values["num_features"].default:
            extra["num_features"] = values.num_features
        drawn = {} if values.samples else self.evaluation.drawn_settings
        return suffix(drawn | extra, self.evaluation.drawn_defaults)

    @property
    def _sampling_suffix(self) -> str:
        return suffix(self.evaluation.drawn_settings, self.evaluation.drawn_defaults)

    @property
    def _split(self) -> str:
        config = self.evaluation.model.config["data"]
        return self.evaluation.values.reference_split or config["train_split"]

    @property
    def _reference_path(self) -> Path:
        values, model = self.evaluation.values, self.evaluation.model
        if values.reference:
            return Path(values.reference)
        data = values.reference_data or model.config["data"]["name"]
        name = f"reference-{quote(data, safe='')}-{quote(self._split, safe='')}.npz"
        return model.workdir / "evals" / name

    def _measure(self, chunks: Iterable, count: int, *, what: str) -> Statistics:
        statistics = Statistics(count, self.evaluation.values.num_features)
        return self._collect(self._batches(chunks), statistics, count, what)

    def _batches(self, chunks: Iterable, start: int = 0) -> Iterable[Batch]:
        size = self.evaluation.values.batch_size
        rows = sharding.local_rows(self.evaluation.mesh, size)
        return in_batches(chunks, batch_size=size, rows=rows, start=start)

    def _collect(self, batches, statistics, total: int, what: str, after=None) -> Statistics:
        with tqdm(
            total=total, initial=statistics.done, unit=" images", desc=what, disable=None,
            leave=False,
        ) as bar:  # fmt: skip

            def both(images: int) -> None:
                bar.update(images)
                if after is not None:
                    after(images)

            collect(
                self.network, batches, statistics, mesh=self.evaluation.mesh,
                batch_size=self.evaluation.values.batch_size, after=both,
            )  # fmt: skip
        return statistics.merged()


def _named(facts: dict[str, Any]) -> str:
    """A reference for a person, with all that a distance depends on in it."""
    images = f"{facts['images']:,} images" if facts["images"] else "images of unknown number"
    data = facts["data"]
    if not data:
        return (
            f"{facts['file']}: {images}, of data and resize that it does not say, checksum of the "
            f"file {facts['checksum']}"
        )
    return (
        f"{data['name']} {data['version']} {data['split']}: {images}, resize: {data['resize']}, "
        f"checksum {data['checksum']}"
    )


def fid(quality: Quality) -> list[Outcome]:
    """Fréchet distance between the pooled features."""
    real = quality.reference.gaussian("pooled")
    found = frechet_distance(Gaussian.of(quality.samples[0].pooled), real)
    return [quality.outcome("fid", found)]


def sfid(quality: Quality) -> list[Outcome]:
    """Fréchet distance between spatial features (arXiv 2103.03841), as ADM's evaluator has it."""
    real = quality.reference.gaussian("spatial")
    found = frechet_distance(Gaussian.of(quality.samples[0].spatial), real)
    return [quality.outcome("sfid", found)]


def kid(quality: Quality) -> list[Outcome]:
    """The kernel distance between the pooled features."""
    real, made = _features(quality)
    found = kernel.kernel_distance(real, made, seed=quality.evaluation.values.seed)
    facts = {"subsets": found.subsets, "subset_size": found.size}
    return [quality.outcome("kid", found.mean, found.standard_error, **facts)]


def precision_recall(quality: Quality) -> list[Outcome]:
    return _by_neighbours(quality, neighbours.precision_recall, NEIGHBOURS["precision_recall"])


def density_coverage(quality: Quality) -> list[Outcome]:
    return _by_neighbours(quality, neighbours.density_coverage, NEIGHBOURS["density_coverage"])


def _by_neighbours(quality: Quality, measure, k: int) -> list[Outcome]:
    real, made = _features(quality)
    found = measure(real, made, k)
    facts = {"k": k, "features": {"samples": len(made), "reference": len(real)}}
    return [quality.outcome(name, value, **facts) for name, value in found._asdict().items()]


def _features(quality: Quality):
    real = quality.reference.some_features()
    return real, quality.samples[0].kept()[1]
