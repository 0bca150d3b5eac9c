"""Samples compared with real images: their statistics, the reference, and the distances."""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import UInt8

from jetflow import hosts, sharding, workdir
from jetflow.archive import Images, read_images
from jetflow.buckets import AnyPath
from jetflow.evals import distances, features, inception
from jetflow.evals.batching import Batching
from jetflow.evals.features import Features, Statistics
from jetflow.evals.records import record
from jetflow.evals.settings import (
    DISTANCES,
    NEIGHBOURS,
    EvaluateOptions,
    TrainedFlow,
    run_data,
    source,
)
from jetflow.files import check_writable
from jetflow.npz import Npz
from jetflow.pictures import labels_in_turn
from jetflow.types import Batch, UsageError, is_arrays

PARTS = {"fid": "pooled", "sfid": "spatial"}  # of `Features`; the other metrics: "features"


def drawn_batches(
    model: TrainedFlow, options: EvaluateOptions, statistics: Statistics | None = None
) -> Iterator[Batch]:
    """This process's rows of samples whose labels take turns.

    Args:
        statistics: of those before; those that are not finite are counted there.
    """
    num, classes = options.num_samples, model.flow.num_classes
    label = labels_in_turn(num, classes)
    start = statistics.done if statistics else 0

    def chunks() -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
        for drawn in model.draw(
            options, num=num, label=label, seed=options.seed, batch_size=options.batch_size,
            start=start,
        ):  # fmt: skip
            if statistics:
                statistics.arrays["not_finite"] += (~drawn.finite).sum()
            yield drawn.images(model.noise.kind)

    return Batching(model.mesh, options.batch_size).of_images(chunks(), classes, start)


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """A trained flow and options; samples and reference are computed once for all metrics."""

    model: TrainedFlow
    options: EvaluateOptions

    @property
    def batching(self) -> Batching:
        return Batching(self.model.mesh, self.options.batch_size)

    @functools.cached_property
    def file(self) -> Npz:
        """That of the option `samples`."""
        assert self.options.samples
        return Npz(self.options.samples, "samples", "an .npz of `jetflow sample --npz`")

    @functools.cached_property
    def given(self) -> Images:
        """The images of the option `samples`."""
        return read_images(self.file, self.options.batch_size)

    def labelled(self) -> Iterator[Batch]:
        """Samples whose labels take turns: drawn, or those of the option `samples`."""
        options, classes = self.options, self.model.flow.num_classes
        if not options.samples:
            return drawn_batches(self.model, options)
        num, *_ = self.file.shape("images", "B", (None, *self.model.flow.image_shape))
        labels = self.file.array("labels", "i", (num,)) if "labels" in self.file else None
        if not np.array_equal(np.arange(num) % classes, [] if labels is None else labels):
            raise self.file.fault(f"its labels are not 0 to {classes - 1} in turn")
        return self.batching.of_images(self.given.chunks, classes)

    def facts_of_samples(self) -> dict[str, Any]:
        """What samples are, for the record, but for how they look."""
        if self.options.samples:
            digest = features.checksum(self.options.samples)
            name = str(self.options.samples)
            return {"images": self.given.num, "file": name, "checksum": digest}
        drawn = self.options.sampling(self.model)
        return {"images": self.options.num_samples, **drawn}

    def count_samples(self) -> int:
        """How many samples are compared; raises a UsageError if their file cannot be read."""
        return self.given.num if self.options.samples else self.options.num_samples

    @functools.cached_property
    def network(self) -> inception.Network:
        return inception.load(self.options.inception_weights)

    def check(self, metrics: Collection[str]) -> None:
        """Raise a UsageError if these metrics lack something, before any sample is drawn."""
        options, compared = self.options, [name for name in metrics if name in DISTANCES]
        if compared:
            self._check_images()
        num = self.count_samples() if compared else 0
        for metric in compared:
            real = self.reference.part(PARTS.get(metric, "features"))
            for k in [NEIGHBOURS[metric]] if metric in NEIGHBOURS else []:
                distances.check_count(min(len(real), num, options.num_features), k)

    def measure(self, metric: str) -> list[dict[str, Any]]:
        """The records of a metric: one, or of a pair of numbers two."""
        part, error, facts = PARTS.get(metric, "features"), None, {}
        real, made = self.reference.part(part), self.samples.part(part)
        if metric in PARTS:
            values = {metric: distances.frechet_distance(made, real)}
        elif metric == "kid":
            mean, error, facts = distances.kernel_distance(real, made, seed=self.options.seed)
            values = {metric: mean}
        else:
            values = getattr(distances, metric)(real, made, NEIGHBOURS[metric])
            counts = {"samples": len(made), "reference": len(real)}
            facts = {"k": NEIGHBOURS[metric], "features": counts}
        facts |= {"network": self.network.facts(), "samples": self.samples.facts}
        facts |= {"reference": self.reference.facts, **source(self.model)}
        return [record(name, value, error, **facts) for name, value in values.items()]

    def suffix(self) -> str:
        """What a result's name ends in: the settings that are not as by default."""
        options, settings = self.options, self.options.changed("num_features")
        if options.samples:
            settings["samples"] = self.samples.facts["checksum"]
        else:
            settings |= options.changed_sampling()
        if options.changed("reference", "reference_data", "reference_split"):
            settings["reference"] = self.reference.facts["checksum"]
        if not self.network.is_published:
            settings["inception"] = self.network.sha256[:8]
        return workdir.suffix(settings, {})

    @functools.cached_property
    def samples(self) -> Features:
        options = self.options
        if options.samples:
            statistics, broken = self._of_images(self.given, "samples"), self.given.not_finite
            return Features(statistics.parts(), self.facts_of_samples() | {"not_finite": broken})
        drawn = options.sampling(self.model) | {"num_features": options.num_features}
        settings = drawn | {"step": self.model.step, "weights_sha256": self.network.sha256}
        name = f"samples-{self.model.step:08d}{workdir.suffix(options.changed_sampling(), {})}"
        path = self.model.workdir / "evals" / f"{name}.partial.npz"
        statistics = Statistics(options.num_samples, options.num_features)
        statistics.resume(path, settings)
        batches = drawn_batches(self.model, options, statistics)
        save = functools.partial(statistics.save, path, settings)
        statistics.collect(self.network, self.batching, batches, "samples", save)
        if hosts.is_first():
            path.unlink(missing_ok=True)
        labels = "each equally often" if self.model.flow.num_classes else None
        facts = {"images": options.num_samples, "labels": labels, **drawn}
        facts["not_finite"] = int(statistics.arrays["not_finite"][0])
        return Features(statistics.parts(), facts)

    @functools.cached_property
    def reference(self) -> Features:
        path, options = self._reference_path(), self.options
        if not path.exists():
            others = sorted(map(str, (self.model.workdir / "evals").glob("reference-*")))
            raise UsageError(
                f"reference {path} does not exist; make it with `jetflow evaluate --workdir "
                f"{self.model.workdir} --make_reference`, or give another"
                + (f", such as {', '.join(others)}" if others else "")
            )
        measure = functools.partial(self._of_images, name="reference")
        needed = bool({*options.measured()} & {*NEIGHBOURS})
        chunk = options.batch_size
        return features.read_reference(path, self.network, measure, chunk=chunk, images=needed)

    def _check_images(self) -> None:
        if is_arrays(self.model.flow.image_shape):
            raise UsageError(
                "fid and its like compare features of images, and this flow is of arrays; "
                "leave them out"
            )

    def make_reference(self) -> AnyPath:
        """Write the reference file that the options ask for."""
        self._check_images()
        options, path = self.options, self._reference_path()
        sharding.check_batch("batch_size", options.batch_size, self.model.mesh)
        check_writable("reference", path)
        self.count_samples()  # a bad file of them is refused first
        split, name = self._reference_split(), options.reference_data
        data = run_data(self.model, split, options, name)
        statistics = Statistics(len(data), options.num_features).collect(
            self.network, self.batching, self.batching.of_data(data), "reference"
        )
        if hosts.is_first():
            features.write_reference(path, statistics, self.network, data.facts())
        hosts.agreed(True)  # the others wait for the file
        hosts.wait_to_see(path)
        return path

    def _reference_split(self) -> str:
        return self.options.reference_split or self.model.config["data"]["train_split"]

    def _reference_path(self) -> AnyPath:
        if self.options.reference:
            return self.options.reference
        data = self.options.reference_data or self.model.config["data"]["name"]
        name = f"reference-{quote(data, safe='')}-{quote(self._reference_split(), safe='')}.npz"
        return self.model.workdir / "evals" / name

    def _of_images(self, images: Images, name: str) -> Statistics:
        """Statistics of the images of a file, which all processes read."""
        batches = self.batching.of_images(images.chunks)
        statistics = Statistics(images.num, self.options.num_features)
        return statistics.collect(self.network, self.batching, batches, name)
