"""A point of a sweep: the run that it needs, trained where it is not, then measured and shown."""

import dataclasses
import difflib
import math
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from jetflow import configs, hosts, sharding
from jetflow.cli import configs as old_configs
from jetflow.cli import evaluate
from jetflow.cli import flags as command_flags
from jetflow.cli.commands import sample, sampling
from jetflow.cli.mesh import read_mesh
from jetflow.evals.evaluation import results
from jetflow.evals.quality import Quality
from jetflow.evals.records import describe
from jetflow.evals.settings import DISTANCES, LIKELIHOODS, EvaluateOptions
from jetflow.files import write_json
from jetflow.hosts import Stopped
from jetflow.model import Model, load_model
from jetflow.pictures import grid, labels_in_turn, rows_by_class, save_png
from jetflow.sweeps import Point, Sweep, is_of_training, say
from jetflow.tools.sweep.folder import Folder
from jetflow.training import loop
from jetflow.types import Config, UsageError
from jetflow.workdir import environment, suffix

# Flags of `evaluate` and `sample` that no point sets: the sweep gives them, or their files.
OWN = ("metrics", "workdir", "data_dir", "make_reference", "num", "out", "npz", "mode")


class Runner:
    """Measures points one after another.

    A model is loaded once for all points in a row that measure it, and programs are compiled once
    for settings that are numbers to them, such as guidance and temperature.
    """

    def __init__(self, sweep: Sweep, folder: Folder, *, run: str | None, data_dir: str | None):
        self._sweep, self._folder, self._data_dir = sweep, folder, data_dir
        self._run = run
        self._trained: set[str] = set()
        self._untrained: dict[str, str] = {}  # and why: tried once for all points that share it
        self._loaded: tuple[Any, Model] | None = None
        self._likelihoods: dict[Any, list[dict[str, Any]]] = {}

    def check(self, *, on_this_machine: bool) -> None:
        """Raise a UsageError where a setting of a point is none, or is of the wrong type.

        Args:
            on_this_machine: or if the points do not fit its devices.
        """
        known = {field.name for field in dataclasses.fields(evaluate.CommandOptions)}
        known |= {*self._parse(sample, {})}
        runs = set()
        for point in self._sweep.points:
            settings = self._sweep.settings(point)
            of_training = [name for name in point.choices if is_of_training(name)]
            try:
                if self._run is not None and of_training:
                    raise UsageError(f"{of_training[0]} is swept, so --run cannot be given")
                if self._run is None and point.run_name not in runs:
                    self._config(settings)
                    runs.add(point.run_name)
                for name in settings:
                    if name in OWN:
                        raise UsageError(f"{name} cannot be set: it is the sweep's own to give")
                    if not is_of_training(name) and name not in known:
                        nearest = difflib.get_close_matches(name, known, n=1)
                        raise UsageError(
                            f"{name} is no flag of `jetflow evaluate` or `sample`, and no "
                            "config.SECTION.FIELD"
                            + (f"; did you mean {nearest[0]}?" if nearest else "")
                        )
                values = self._evaluation(settings)
                if on_this_machine:
                    mesh = read_mesh(values.mesh)
                    sharding.check_batch("batch_size", values.batch_size, mesh)
                self._parse(sample, settings)
            except UsageError as error:
                raise UsageError(f"point {point.name}: {error}") from error

    def recipe(self) -> dict[str, Any] | None:
        """The config that trainings change fields of; none where a run is given."""
        return None if self._run else self._config({}).to_dict()

    def pinned(self, known: int | None) -> Sweep:
        """The sweep with the checkpoint of the given run fixed at all points that name none.

        So that a run that is trained on, or another process that starts later, mixes no two.

        Args:
            known: the step that the folder of the sweep was begun with.

        Raises:
            UsageError: if the run has no sound checkpoint, or that step no more.
        """
        open_points = [p for p in self._sweep.points if "step" not in self._sweep.settings(p)]
        if self._run is None or not open_points:
            return self._sweep
        mesh = read_mesh(self._evaluation(self._sweep.settings(open_points[0])).mesh)
        model = load_model(Path(self._run), known, mesh)
        self._loaded = (Path(self._run), model.step, mesh), model
        fixed = {**self._sweep.fixed, "step": model.step}
        self._sweep = dataclasses.replace(self._sweep, fixed=fixed)
        return self._sweep

    def go_through(self, points: list[Point]) -> tuple[int, int]:
        """Measure those points that were not yet measured, and that no other process is at.

        Returns:
            How many failed, and how many others are at.
        """
        failed = elsewhere = 0
        for point in points:
            with self._folder.locked(point.name, wait=False) as mine:
                if not mine:
                    elsewhere += 1
                elif not hosts.agreed(self._folder.is_done(point)):
                    say(f"point {point.name}, one of {len(self._sweep.points)}")
                    failed += not self.go(point)
        return failed, elsewhere

    def go(self, point: Point) -> bool:
        """Measure a point and write its record; whether it went well.

        Of several processes that are joined, a failure ends all: one may have failed alone, and the
        others wait for it.
        """
        start = time.perf_counter()
        record = {
            "number": point.number,
            "name": point.name,
            "settings": {name: choice.label for name, choice in point.choices.items()},
        }
        try:
            record |= {"status": "done", **self._measure(point)}
        except Stopped:
            raise
        except Exception as error:
            if jax.process_count() > 1:
                raise
            if not isinstance(error, UsageError):
                traceback.print_exc()
            record |= {"status": "failed", "error": _told(error)}
            say(f"point {point.name} failed: {record['error']}")
        record["seconds"] = time.perf_counter() - start
        record["environment"] = environment()
        write_json(self._folder.record_path(point), record)
        return record["status"] == "done"

    def _measure(self, point: Point) -> dict[str, Any]:
        settings = self._sweep.settings(point)
        workdir = Path(self._run) if self._run else self._train(point)
        values = self._evaluation(settings)
        mesh = read_mesh(values.mesh)
        model = self._load(workdir, values.step, mesh)
        results = self._likelihoods_of(values, model)
        others = [name for name in self._sweep.metrics if name not in LIKELIHOODS]
        if set(others) & set(DISTANCES):
            values = dataclasses.replace(values, reference=self._made_reference(values, model))
        if others:
            results = results + _say_all(model, dataclasses.replace(values, metrics=tuple(others)))
        results = sorted(results, key=lambda result: self._place(result["metric"]))
        if self._sweep.pictures:
            picture = self._picture(self._parse(sample, settings), model, mesh)
            save_png(self._folder.record_path(point).with_suffix(".png"), picture)
        sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(model.variables["params"]))
        return {
            "metrics": {result["metric"]: result["value"] for result in results},
            "errors": {result["metric"]: result.get("standard_error") for result in results},
            "results": results,
            "workdir": self._run or f"runs/{point.run_name}",
            "step": model.step,
            "parameters": sum(sizes),
        }

    def _train(self, point: Point) -> Path:
        """The workdir of the point's run, when its training has ended."""
        name = point.run_name
        workdir = self._folder.path / "runs" / name
        if name in self._untrained:
            raise UsageError(self._untrained[name])
        if name in self._trained:
            return workdir
        try:
            self._go_on_training(point, workdir)
        except Stopped:
            raise
        except Exception as error:
            self._untrained[name] = _told(error)
            raise
        self._trained.add(name)
        return workdir

    def _go_on_training(self, point: Point, workdir: Path) -> None:
        with self._folder.locked(f"run,{point.run_name}", wait=True):
            try:
                config = self._config(self._sweep.settings(point))
                loop.train(config, workdir, data_dir=self._data_dir)
            except loop.Diverged as error:
                raise UsageError(str(error)) from error

    def _load(self, workdir: Path, step: int | None, mesh: Mesh) -> Model:
        key = workdir, step, mesh
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # makes room
            self._loaded = key, load_model(workdir, step, mesh)
        return self._loaded[1]

    def _likelihoods_of(self, values: EvaluateOptions, model: Model) -> list[dict[str, Any]]:
        """The metrics that need no samples, measured once for all points that draw them alike."""
        chosen = [name for name in self._sweep.metrics if name in LIKELIHOODS]
        if not chosen:
            return []
        key = model.workdir, model.step, values.split, values.draws, values.seed
        if key not in self._likelihoods:
            chosen_values = dataclasses.replace(values, metrics=tuple(chosen))
            self._likelihoods[key] = _say_all(model, chosen_values)
        return self._likelihoods[key]

    def _place(self, metric: str) -> int:
        """Where the sweep asks for a metric; "precision" is one of "precision_recall"."""
        asked = self._sweep.metrics
        parts = [place for place, name in enumerate(asked) if metric in name.split("_")]
        return asked.index(metric) if metric in asked else parts[0]

    def _made_reference(self, values: EvaluateOptions, model: Model) -> Path:
        """The reference of the point, made by the first that needs it.

        One for all points that compare with as many features, by one network, of the same data.
        """
        if values.reference is not None:
            return values.reference
        data = model.config["data"]
        settings = {
            "data": values.reference_data or data["name"],
            "split": values.reference_split or data["train_split"],
            **values.changed("num_features", "inception_weights"),
        }
        name = f"reference{suffix(settings, {})}.npz"
        path = self._folder.path / name
        with self._folder.locked(name, wait=True):
            if not hosts.agreed(path.exists()):
                Quality(model, dataclasses.replace(values, reference=path)).make_reference()
        return path

    def _picture(self, values: flags.FlagValues, model: Model, mesh: Mesh) -> np.ndarray:
        """Samples of all classes, in a grid that is about square."""
        num = self._sweep.pictures
        labels = labels_in_turn(num, model.flow.num_classes)
        sampler = sampling.sampler(values, model, mesh, num)
        drawn = sampling.draw(sampler, values, model, num=num, label=labels)
        images = np.concatenate([images for images, _ in drawn])
        return grid(images, rows_by_class(None, num))

    def _config(self, settings: Mapping[str, Any]) -> Config:
        if self._sweep.config is None:
            raise UsageError("the sweep has no config to train; give the run to measure by --run")
        changed = configs.read(self._sweep.config)
        for name, value in settings.items():
            if is_of_training(name):
                configs.change(changed, name.removeprefix("config."), value)
        return changed

    def _evaluation(self, settings: Mapping[str, Any]) -> evaluate.CommandOptions:
        names = {field.name for field in dataclasses.fields(evaluate.CommandOptions)}
        chosen = {name: value for name, value in settings.items() if name in names}
        chosen |= {"metrics": ",".join(self._sweep.metrics), "workdir": "unused"}
        if self._data_dir is not None:
            chosen["data_dir"] = self._data_dir
        argv = ["evaluate", *(f"--{name}={value}" for name, value in chosen.items())]
        return command_flags.parse(evaluate.COMMAND, argv)

    def _parse(self, command: Any, settings: Mapping[str, Any]) -> flags.FlagValues:
        """The flags of a command with those settings that it has."""
        values = flags.FlagValues()
        command.define(values, [])
        given = {name: value for name, value in settings.items() if name in values}
        if self._data_dir is not None:
            given["data_dir"] = self._data_dir
        argv = [command.__name__.rpartition(".")[2]]
        old_configs.parse(values, argv + [f"--{name}={value}" for name, value in given.items()])
        return values


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"


def _say_all(model: Model, options: EvaluateOptions) -> list[dict[str, Any]]:
    measured = []
    for result, path in results(model, options):
        say(f"step {model.step}: {describe(result)}\nwritten to {path}")
        measured.append(result)
    return measured
