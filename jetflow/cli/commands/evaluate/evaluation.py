"""What is evaluated, and what comes of it: shared by the metrics of `jetflow evaluate`."""

import dataclasses
import functools
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh

from jetflow.cli.commands import sampling
from jetflow.data import dataset as pipeline
from jetflow.model import Model
from jetflow.noise import Noise
from jetflow.types import UsageError
from jetflow.workdir import suffix


class Outcome(NamedTuple):
    """One number: its record, what a person reads of it, and what its file's name ends in."""

    result: dict[str, Any]
    text: str
    suffix: str


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A trained flow, the flags, and the data that they name."""

    values: flags.FlagValues
    model: Model
    mesh: Mesh

    @property
    def trained_with(self) -> Noise:
        return Noise(**self.model.config["noise"])

    @property
    def source(self) -> dict[str, Any]:
        """Which weights a result is of."""
        averaged = self.model.config["train"]["ema_decay"]
        return {"step": self.model.step, "weights": "ema" if averaged else "params"}

    @functools.cached_property
    def held_out(self) -> pipeline.Dataset:
        """The split of --split."""
        given = self.values.split
        return self.load(self.model.config["data"]["test_split"] if given is None else given)

    def load(self, split: str) -> pipeline.Dataset:
        """A split of the run's data set.

        Raises:
            UsageError: if the run names none.
        """
        name = self.model.config["data"]["name"]
        if not name:
            raise UsageError(
                f"{self.model.workdir} names no data set; convert it again with --data NAME, to "
                "another --out"
            )
        return pipeline.load(name, split, data_dir=self.values.data_dir)

    @property
    def draws(self) -> int:
        return self.values.draws or self.model.config["eval"]["draws"]

    @property
    def classifier_noise(self) -> Noise:
        """That of the training, in which labels are told apart."""
        return dataclasses.replace(self.trained_with, label_drop=0.0, flip=False)

    @property
    def drawn_settings(self) -> dict[str, Any]:
        """All that samples depend on, but for the batch size."""
        own = {name: self.values[name].value for name in ("num_samples", "seed")}
        return own | sampling.settings(self.values)

    @property
    def drawn_defaults(self) -> dict[str, Any]:
        own = {name: self.values[name].default for name in ("num_samples", "seed")}
        return own | sampling.defaults(self.values)

    def likelihood_suffix(self) -> str:
        """Empty for what a training evaluates at its end: those results stay where they are."""
        config = self.model.config
        settings = {
            "split": self.held_out.split, "draws": self.draws, "seed": self.values.seed
        }  # fmt: skip
        defaults = {
            "split": config["data"]["test_split"], "draws": config["eval"]["draws"], "seed": 0
        }  # fmt: skip
        return suffix(settings, defaults)
