"""Samples drawn for an evaluation: only their statistics are kept, and a kill costs little."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from jetflow import hosts
from jetflow.cli.commands import sampling
from jetflow.cli.commands.evaluate.evaluation import Evaluation
from jetflow.evals.statistics import Statistics
from jetflow.files import write_atomically
from jetflow.pictures import labels_in_turn

SAVED_EVERY = 5000  # images


class DrawnSamples:
    """The samples that the flags ask for; labels take turns.

    Attributes:
        settings: all that the statistics depend on, by the names of flags.
        path: where they are saved while they are incomplete.
    """

    def __init__(self, evaluation: Evaluation, network_sha256: str, path: Path):
        self._evaluation = evaluation
        self.path = path
        values, model = evaluation.values, evaluation.model
        self._sampler = sampling.sampler(values, model, evaluation.mesh, values.num_samples)
        self.settings = sampling.used(values, model) | {
            name: values[name].value for name in ("num_samples", "seed", "num_features")
        }
        self._made_with = self.settings | {"step": model.step, "weights_sha256": network_sha256}

    def chunks(self, statistics: Statistics) -> Iterator[UInt8[np.ndarray, "_ H W C"]]:
        """The images from `statistics.done` on; counts those that are not finite."""
        values, model = self._evaluation.values, self._evaluation.model
        num = values.num_samples
        label = labels_in_turn(num, model.flow.num_classes)
        for images, drawn in sampling.draw(
            self._sampler, values, model, num=num, label=label, start=statistics.done
        ):
            statistics.broken += int((~drawn.finite).sum())
            yield images

    def resume(self, statistics: Statistics) -> None:
        """Take up what an evaluation with the same settings left, if it did."""
        saved = self._read() if hosts.is_first() else None
        if saved is not None:
            statistics.restore(saved)  # on the first process: the sums are over all of them
            statistics.done, statistics.broken = map(int, saved["progress"])
        statistics.done = hosts.agreed(statistics.done)
        statistics.broken = hosts.agreed(statistics.broken)

    def saver(self, statistics: Statistics) -> Callable[[int], None]:
        """Called after each batch: saves the statistics now and then."""
        last = statistics.done

        def after(_images: int) -> None:
            nonlocal last
            if statistics.done - last >= SAVED_EVERY:
                last = statistics.done
                self._save(statistics.merged())

        return after

    def finish(self) -> None:
        """Remove what was saved."""
        if hosts.is_first():
            self.path.unlink(missing_ok=True)

    def _save(self, merged: Statistics) -> None:
        if not hosts.is_first():
            return
        arrays: dict[str, Any] = dict(merged.arrays())
        arrays["settings"] = np.array(json.dumps(self._made_with))
        arrays["progress"] = np.array([merged.done, merged.broken])
        with write_atomically(self.path) as file:
            np.savez(file, **arrays)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                saved = dict(file)
            made_with = json.loads(str(saved.pop("settings")))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("%s is damaged (%s): all samples are drawn again", self.path, error)
            return None
        return saved if made_with == self._made_with else None
