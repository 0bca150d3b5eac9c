"""A config made into the objects of a training run, and checked before anything is written."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Lowered

from jetflow import configs, hosts, optim, sharding
from jetflow.data import dataset as pipeline
from jetflow.data.reading import Ahead
from jetflow.fields import differences, flat
from jetflow.flows.build import build
from jetflow.nn.attention import Choice
from jetflow.noise import Noise
from jetflow.options import LARGEST
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.sampling_options import SamplingOptions
from jetflow.training import finetune
from jetflow.training.step import Trainer, TrainState
from jetflow.types import Batch, Config, Flow, Shape, UsageError, is_arrays


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run is made of.

    Attributes:
        config: as the user gave it.
        trainer: the flow, and how it is trained.
        mesh: of all devices.
        train_data, test_data: the splits that are trained on, and held out.
        total_steps: the length of the training.
        abstract_state: shapes and shardings of the training state.
    """

    config: Config
    trainer: Trainer
    mesh: Mesh
    train_data: pipeline.Dataset
    test_data: pipeline.Dataset
    total_steps: int
    abstract_state: TrainState

    @property
    def attention(self) -> Choice:
        """The form of attention that the nets take on the devices of the mesh."""
        return self.trainer.flow.attention_on(self.mesh.devices.flat[0].platform)

    @property
    def resolved_config(self) -> dict[str, Any]:
        """The config, and what it depends on beyond itself: enough to rebuild the flow."""
        config = self.config.to_dict()
        differing = differences(config.pop("defaults", {}), config, prefix="")
        resolved = {
            "image_shape": self.train_data.image_shape,
            "num_classes": self.trainer.flow.num_classes,
            "total_steps": self.total_steps,
            "data_version": self.train_data.version,
            "train_examples": len(self.train_data),
            "train_checksum": self.train_data.known_checksum,  # None for a part of a split
            "defaults": {name: default for name, (default, _) in differing.items()},
        }
        resolved |= {"standard": self.train_data.standard} if self.train_data.standard else {}
        return {**config, "resolved": resolved}

    def abstract_batch(self, size: int) -> Batch:
        """The shapes and shardings of a global batch."""
        shape, rows = (size, *self.train_data.image_shape), sharding.batch_sharding(self.mesh)
        number = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)
        images = jax.ShapeDtypeStruct(shape, self.train_data.dtype, sharding=rows)
        return Batch(images, number, number)

    def sampler(self, variables: Any, **fields: Any) -> Sampler:
        """Draws samples as `config.eval` asks, with some fields of `SamplingOptions` changed."""
        options = SamplingOptions.of(self.config.eval.to_dict(), **fields)
        trainer = self.trainer
        return options.sampler(trainer.flow, variables, trainer.noise, self.mesh)

    def lower_step(self, state: TrainState, batch: Batch) -> Lowered:
        """The training step, before it is compiled; for arrays, or their shapes alone."""
        step = jax.jit(
            self.trainer.train_step, donate_argnums=0, out_shardings=(self._shardings, None)
        )
        with sharding.on(self.mesh):
            return step.lower(state, batch)

    def batches(self, start: int = 0) -> Ahead[Batch, Batch]:
        """Global training batches on the devices, from that of step `start` on."""
        size = self.config.train.batch_size
        batches = pipeline.train_batches(
            self.train_data,
            batch_size=size,
            seed=self.config.train.seed,
            start_step=start,
            rows=sharding.local_rows(self.mesh, size),
            workers=self.config.data.workers,
        )
        return Ahead(batches, lambda batch: sharding.put_batch(batch, self.mesh, size))

    def fresh_state(self) -> tuple[TrainState, str]:
        """The state before the first step, laid out on the mesh, and a table of what it took over.

        Raises:
            UsageError: if `config.init_from` is no run whose weights this flow can start from.
        """
        if not self.config.init_from:
            return jax.jit(self.trainer.first_state, out_shardings=self._shardings)(), ""
        return finetune.first_state(self.config, self.trainer, self.mesh, self._shardings)

    @property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda array: array.sharding, self.abstract_state)


def set_up(
    config: Config,
    load: Callable[[str, str], pipeline.Dataset] = pipeline.load,
    devices: Sequence[Any] | None = None,
) -> Run:
    """Check a config and make its objects.

    Args:
        load: gives the data set of a name and split; by default it is prepared where needed.
        devices: to train on; default: all of this process and its fellows.

    Raises:
        UsageError: on the first thing that cannot work, with the field's name and a remedy.
    """
    hosts.compare(flat(config.to_dict()))
    configs.check(config)
    optim.patterns(config.optim.multipliers)
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    mesh = sharding.make_mesh(**sizes, devices=devices)
    train, data = config.train, config.data
    sharding.check_batch("config.train.batch_size", train.batch_size, mesh, train.accumulation)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    count_steps(train, examples=1)  # for what it refuses, before any data is prepared
    noise = Noise(**config.noise)
    train_data, test_data = (_split(data, field, load) for field in ("train_split", "test_split"))
    _check_labels(config, train_data)
    classes = train_data.num_classes if data.labels else 0
    shape, standard = train_data.image_shape, train_data.standard
    flow = build(config.flow, image_shape=shape, num_classes=classes, standard=standard)
    _check_levels(flow, noise)
    _check_arrays(shape, noise)
    _check_samples(config.eval, flow, noise)
    total_steps = count_steps(train, len(train_data))
    tx, schedule = optim.adam(total_steps=total_steps, **config.optim)
    trainer = Trainer(
        flow, tx, schedule, noise, train.seed, train.accumulation, train.ema_decay,
        config.optim.multipliers,
    )  # fmt: skip
    abstract = jax.eval_shape(trainer.first_state)
    shardings = sharding.state_shardings(mesh, abstract, config.mesh.rules)
    abstract = sharding.placed(abstract, shardings)
    if devices is None:
        sharding.check_memory(abstract, mesh)
    return Run(config, trainer, mesh, train_data, test_data, total_steps, abstract)


def _split(
    data: Config, field: str, load: Callable[[str, str], pipeline.Dataset]
) -> pipeline.Dataset:
    try:
        return load(data.name, data[field])
    except UsageError as error:
        is_split = str(error).startswith(repr(data[field]))
        raise type(error)(f"{error}{f' (config.data.{field})' * is_split}") from error


def count_steps(train: Config, examples: int) -> int:
    """Steps of a training whose length is stated as steps, epochs or images."""
    lengths = {name: train[name] for name in ("steps", "epochs", "images") if train[name]}
    if len(lengths) != 1 or min(lengths.values()) < 0:
        stated = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise UsageError(
            "expected exactly one of config.train.steps, config.train.epochs and "
            "config.train.images above 0, but "
            + (f"got {stated}; set the others to 0" if stated else "all are 0; set one")
        )
    [(unit, length)] = lengths.items()
    images = {"steps": length * train.batch_size, "epochs": length * examples, "images": length}
    steps = -(-images[unit] // train.batch_size)
    if steps > LARGEST:
        raise UsageError(
            f"config.train.{unit} is {length}, of {steps} steps; expected {LARGEST} or fewer"
        )
    return steps


def _check_levels(flow: Flow, noise: Noise) -> None:
    if flow.noise_conditional != (noise.kind == "levels") or (noise.t0 and not noise.t1):
        raise UsageError(
            f"config.flow.noise_conditional is {flow.noise_conditional} and config.noise has kind "
            f"{noise.kind}, t0 {noise.t0}, t1 {noise.t1}; a flow that is noise-conditional needs "
            "noise of kind levels, and no other flow does"
        )


def _check_arrays(shape: Shape, noise: Noise) -> None:
    kind, others = ("arrays", "uniform") if is_arrays(shape) else ("images", "none")
    if noise.kind == others:
        raise UsageError(
            f"config.noise.kind is {noise.kind}, which is not for {kind}; set it to "
            f"{'none, gaussian' if kind == 'arrays' else 'uniform, gaussian'} or levels"
        )
    if noise.flip and kind == "arrays":
        raise UsageError("config.noise.flip is True, but arrays have no left and right; set False")


def _check_samples(section: Config, flow: Flow, noise: Noise) -> None:
    try:
        SamplingOptions.of(section.to_dict()).sampler(flow, {}, noise)
    except UsageError as error:
        raise UsageError(f"config.eval.{error}") from error


def _check_labels(config: Config, data: pipeline.Dataset) -> None:
    if config.data.labels and not data.num_classes:
        raise UsageError(
            f"config.data.labels is True, but data set {data.name} has no labels; set it to False"
        )
    if config.noise.label_drop and not config.data.labels:
        raise UsageError(
            f"config.noise.label_drop is {config.noise.label_drop}, but the flow has no labels;"
            " set config.data.labels=True, or the drop to 0"
        )
