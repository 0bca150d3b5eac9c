"""`sweep`: each point's training, measured and shown."""

import dataclasses
import difflib
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jetflow import configs, hosts, pictures, sharding, signals
from jetflow.buckets import AnyPath, as_path, resolved
from jetflow.evals import inception
from jetflow.evals.evaluation import evaluate
from jetflow.evals.settings import DISTANCES, LIKELIHOODS, EvaluateOptions
from jetflow.fields import flat
from jetflow.files import disk_errors_explained, write_json
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import Model, load_model
from jetflow.options import DataOptions, checked
from jetflow.sweeps import Point, Sweep, is_of_training, read
from jetflow.tools.report.document import report
from jetflow.tools.sweep.store import Store
from jetflow.training.loop import Diverged, train
from jetflow.types import Config, UsageError
from jetflow.workdir import SWEEP, environment, read_flow, suffix

# Options that the sweep itself gives.
OWN = ("metrics", "make_reference", *DataOptions().data_fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointOptions(EvaluateOptions, ModelOptions):
    """The settings of a point that are not of its training."""


def sweep(
    sweep: Sweep | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    run: str | os.PathLike | None = None,
    fix: Mapping[str, Any] | None = None,
    shard: tuple[int, int] | None = None,
    point: int | None = None,
    **data: Any,
) -> list[dict[str, Any]]:
    """Measure the points of a sweep that were not measured yet, and write its page.

    Processes that share the folder never measure a point twice. A point that fails is recorded,
    and tried again by the next call.

    Args:
        sweep: a sweep, or its file.
        workdir: the folder of the sweep; the same call goes on in it.
        run: the workdir of a trained run to measure; default: the sweep's config is trained.
        fix: settings of all points, in place of the sweep's.
        shard: (i, n) for every n-th point from the i-th on.
        point: the number of the only point to measure.
        data: where the data sets are: fields of `DataOptions`, such as data_dir.

    Returns:
        The records of all points that were measured or failed, also by others.

    Raises:
        UsageError: before anything is measured, if a point cannot work.
        Stopped: a signal stopped a training; everything is saved.
    """
    sweep = (sweep if isinstance(sweep, Sweep) else read(os.fspath(sweep))).with_fixed(fix or {})
    run = None if run is None else resolved(as_path(run))
    runner = Runner(sweep, Store(as_path(workdir)), run, DataOptions(**data).data_fields)
    points = sweep.chosen(shard, point)
    runner.begin(points)
    for each in points:
        runner.visit(each)
    if hosts.is_first():
        report(workdir)
    return runner.store.records()


@dataclasses.dataclass
class Runner:
    """Measures points, of a trained run or of trainings in the sweep's folder.

    A model is loaded once for all points in a row that measure it, and programs are compiled once
    for settings that are numbers to them, such as guidance and temperature.
    """

    sweep: Sweep
    store: Store
    run: AnyPath | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    _failures: dict[str, Exception | None] = dataclasses.field(default_factory=dict)  # of trainings
    _loaded: tuple[Any, Model] | None = None
    _likelihoods: dict[Any, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise a UsageError where a setting of a point is unknown or of the wrong type."""
        if self.run:
            read_flow(self.run)  # which raises if there is none
        for point in self.sweep.points:
            try:
                self._options(point)
                if not self.run:
                    configs.check(self._config(point))
            except UsageError as error:
                raise UsageError(f"point {point.name}: {error}") from error

    def begin(self, chosen: Sequence[Point]) -> None:
        """Check all points, and begin the folder, or go on with it, to measure the chosen ones.

        Points of a given run that name no step are measured at one checkpoint, the newest when the
        sweep began: a run that is trained on mixes no two.
        """
        run, recipe = self.run and str(self.run), {} if self.run else self._config().to_dict()
        recipe.pop("defaults", None)
        content = self.sweep.content(run, recipe)
        points = zip((point.name for point in self.sweep.points), content["points"], strict=True)
        hosts.compare(flat(content | {"points": dict(points)}, "the sweep."))
        self.check()
        self._check_network(chosen)
        meshes = []
        for point in self.sweep.points:
            options = self._options(point)
            meshes.append(read_mesh(options.mesh))
            sharding.check_batch(f"point {point.name}: batch_size", options.batch_size, meshes[-1])
        with self.store.locked(SWEEP, wait=True):
            step = hosts.agreed(self.store.step(run) or -1)
            if self.run and any("step" not in self.sweep.settings(p) for p in self.sweep.points):
                model = self._load(self.run, step if step > 0 else None, meshes[0])
                self.sweep = self.sweep.with_fixed({"step": model.step})
            self.store.begin(self.sweep.content(run, recipe))

    def _check_network(self, points: Sequence[Point]) -> None:
        """Raise a UsageError where points lack the network of their metrics, before they train."""
        compare = set(self.sweep.metrics) & set(DISTANCES)
        missing = [point for point in points if compare and not self.store.is_done(point)]
        for path in {self._options(point).inception_weights for point in missing}:
            try:
                inception.load(path)
            except UsageError as error:
                text = str(error).replace("--inception_weights ", "--fix inception_weights=")
                raise UsageError(text) from error

    def visit(self, point: Point) -> None:
        """Measure a point and write its record, unless it is done or another process is at it.

        Of several processes that are joined, a failure ends all: one may have failed alone, and the
        others wait for it.
        """
        with self.store.locked(point.name, wait=False) as mine:
            if not mine or hosts.agreed(self.store.is_done(point)):
                return
            hosts.note(f"point {point.name}, one of {len(self.sweep.points)}")
            start, record = time.perf_counter(), {"number": point.number, "name": point.name}
            try:
                with disk_errors_explained():
                    record |= {"status": "done", **self._measure(point)}
            except signals.Stopped:
                raise
            except Exception as error:
                if jax.process_count() > 1:
                    raise
                if not (known := isinstance(error, UsageError | Diverged)):
                    traceback.print_exc()
                text = str(error) if known else f"{type(error).__name__}: {error}"
                record |= {"status": "failed", "error": text}
                hosts.note(f"point {point.name} failed: {text}")
            record |= {"seconds": time.perf_counter() - start, "environment": environment()}
            write_json(self.store.record_path(point), record)

    def _measure(self, point: Point) -> dict[str, Any]:
        options, metrics = self._options(point), self.sweep.metrics
        workdir = self.run or self._trained(point)
        model = self._load(workdir, options.step, read_mesh(options.mesh))
        results = [*self._of_images(options, model), *self._of_samples(options, model)]
        place = {part: i for i, metric in enumerate(metrics) for part in metric.split("_")}
        place |= {metric: i for i, metric in enumerate(metrics)}
        results.sort(key=lambda result: place[result["metric"]])
        if num := self.sweep.pictures:
            label = pictures.labels_in_turn(num, model.flow.num_classes)
            drawn = model.draw(options, num=num, label=label, seed=options.seed, batch_size=num)
            images = np.concatenate([some.images(model.noise.kind) for some in drawn])
            picture = pictures.samples_grid(images, None)
            pictures.save_png(self.store.record_path(point).with_suffix(".png"), picture)
        sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(model.variables["params"]))
        return {
            "metrics": {result["metric"]: result["value"] for result in results},
            "errors": {result["metric"]: result.get("standard_error") for result in results},
            "results": results,
            "workdir": str(self.run or f"runs/{point.run_name}"),
            "step": model.step,
            "parameters": sum(sizes),
        }

    def _trained(self, point: Point) -> AnyPath:
        """The workdir of the point's run, when its training has ended.

        One that failed is not tried again for the points that share it.
        """
        name, workdir = point.run_name, self.store.path / "runs" / point.run_name
        if name not in self._failures:
            self._failures[name] = None
            try:
                with self.store.locked(f"run,{name}", wait=True):
                    train(self._config(point), workdir, **self.data)
            except Exception as error:
                self._failures[name] = error
        if (failure := self._failures[name]) is not None:
            raise failure
        return workdir

    def _load(self, workdir: AnyPath, step: int | None, mesh: Mesh) -> Model:
        loaded = self._loaded
        if loaded is None or loaded[0] != (workdir, mesh) or step not in (None, loaded[1].step):
            self._loaded = loaded = None  # makes room
            self._loaded = loaded = (workdir, mesh), load_model(workdir, step, mesh)
        return loaded[1]

    def _of_images(self, options: PointOptions, model: Model) -> list[dict[str, Any]]:
        """The metrics that need no samples, measured once for all points that draw them alike."""
        metrics = tuple(name for name in self.sweep.metrics if name in LIKELIHOODS)
        key = model.workdir, model.step, options.split, options.draws, options.seed
        if metrics and key not in self._likelihoods:
            options = dataclasses.replace(options, metrics=metrics)
            self._likelihoods[key] = evaluate(model, options)
        return self._likelihoods.get(key, [])

    def _of_samples(self, options: PointOptions, model: Model) -> list[dict[str, Any]]:
        """The other metrics; the first point that needs a reference makes it.

        It is one for all points that compare with as many features, by one network, of the same
        data.
        """
        metrics = tuple(name for name in self.sweep.metrics if name not in LIKELIHOODS)
        if options.reference is None and set(metrics) & set(DISTANCES):
            data = model.config["data"]
            settings = {
                "data": options.reference_data or data["name"],
                "split": options.reference_split or data["train_split"],
                **options.changed("num_features", "inception_weights"),
            }
            path = self.store.path / f"reference{suffix(settings, {})}.npz"
            options = dataclasses.replace(options, reference=path)
            with self.store.locked(path.name, wait=True):
                if not hosts.agreed(path.exists()):
                    made = dataclasses.replace(options, metrics=None, make_reference=True)
                    evaluate(model, made)
        return evaluate(model, dataclasses.replace(options, metrics=metrics)) if metrics else []

    def _config(self, point: Point | None = None) -> Config:
        """The config of a point's training; without a point that of the sweep."""
        if self.sweep.config is None:
            raise UsageError("the sweep has no config to train; give the run to measure by --run")
        config = configs.read(self.sweep.config)
        settings = self.sweep.settings(point) if point else {}
        for name in filter(is_of_training, settings):
            configs.change(config, name.removeprefix("config."), settings[name])
        return config

    def _options(self, point: Point) -> PointOptions:
        """The settings of a point that are not of its training.

        Raises:
            UsageError: if one is unknown, is of the wrong type, or is not to be given.
        """
        known = [field.name for field in dataclasses.fields(PointOptions) if field.name not in OWN]
        options: dict[str, Any] = {"metrics": self.sweep.metrics, **self.data}
        for name, value in self.sweep.settings(point).items():
            if is_of_training(name) and self.run:
                raise UsageError(
                    f"{name} is a setting of the training, which --run {self.run} has behind it; "
                    "leave out one of them"
                )
            if is_of_training(name):
                continue
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                remedy = f"did you mean {nearest[0]}?" if nearest else "expected one of evaluation"
                raise UsageError(f"{name} is no option that a sweep sets; {remedy}")
            options[name] = checked(PointOptions, name, value)
        return PointOptions(**options)
