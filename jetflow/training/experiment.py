"""A config made into the objects of a training run, and checked before anything is written."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Lowered

from jetflow import optim, sharding
from jetflow.cli.configs import Config
from jetflow.data import dataset as pipeline
from jetflow.data.reading import Ahead
from jetflow.flows.build import build
from jetflow.noise import LARGEST_SEED, Noise
from jetflow.sampling.ancestral import Sampler, check_guidance
from jetflow.sampling.decoding import decodings
from jetflow.training import state as states
from jetflow.training import transfer, transfer_plan
from jetflow.training.state import TrainState
from jetflow.training.step import Trainer
from jetflow.types import Batch, Guidance, UsageError


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
    def resolved_config(self) -> dict[str, Any]:
        """The config, and what it depends on beyond itself: enough to rebuild the flow."""
        resolved = {
            "image_shape": self.train_data.image_shape,
            "num_classes": self.trainer.flow.num_classes,
            "total_steps": self.total_steps,
            "data_version": self.train_data.version,
        }
        return {**self.config.to_dict(), "resolved": resolved}

    def abstract_batch(self, size: int) -> Batch:
        """The shapes and shardings of a global batch."""
        split = sharding.batch_sharding(self.mesh)
        image = jax.ShapeDtypeStruct(
            (size, *self.train_data.image_shape), jnp.uint8, sharding=split
        )
        number = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
        return Batch(image, label=number, index=number)

    def sampler(self, variables: Any) -> Sampler:
        """Draws samples as `config.eval` says."""
        section, flow, noise = self.config.eval, self.trainer.flow, self.trainer.noise
        return Sampler(
            flow,
            variables,
            guidance=guidance_of(section),
            temperature=section.temperature,
            denoise=noise.std if section.denoise else 0.0,
            decoding=decodings(flow),
            mesh=self.mesh,
        )

    def lower_step(self, state: TrainState, batch: Batch) -> Lowered:
        """The training step, before it is compiled; for arrays, or their shapes alone."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        step = jax.jit(self.trainer.train_step, donate_argnums=0, out_shardings=(shardings, None))
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
        """The state before the first step, made where it is to lie, and what it was made of.

        Raises:
            UsageError: if `config.init_from` is no run whose weights this flow can start from.
        """
        create, config = _creation(self.config, self.trainer), self.config
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state)
        if not config.init_from:
            return jax.jit(create, out_shardings=shardings)(), ""
        state = self.abstract_state
        target = transfer_plan.Side(
            flow=self.trainer.flow,
            section=config.flow.to_dict(),
            data=config.data.name,
            abstract={"params": state.params, **state.collections},
        )
        try:
            source = transfer.open_source(Path(config.init_from), config.init_weights)
            plan = transfer_plan.make_plan(source, target)
            taken, step = transfer.restore(source, self.mesh, config.mesh.rules)
            initial = transfer.initialiser(plan, source, target, taken, create)
        except UsageError as error:
            raise UsageError(f"config.init_from is {config.init_from}: {error}") from error
        state = jax.jit(initial, out_shardings=shardings)(taken)
        return state, transfer_plan.describe(plan, source, step)


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
    _check_numbers(config)
    mesh = sharding.make_mesh(
        data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor, devices=devices
    )
    sharding.check_batch(
        "config.train.batch_size", config.train.batch_size, mesh, config.train.accumulation
    )
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    count_steps(config.train, examples=1)  # for what it refuses, before any data is prepared
    noise = Noise(**config.noise)
    train_data = load(config.data.name, config.data.train_split)
    test_data = load(config.data.name, config.data.test_split)
    flow = build(
        config.flow,
        image_shape=train_data.image_shape,
        num_classes=_num_classes(config, train_data),
    )
    check_guidance(flow, guidance_of(config.eval))
    if config.eval.denoise and noise.kind != "gaussian":
        raise UsageError(
            f"config.eval.denoise needs gaussian noise, but config.noise.kind is {noise.kind!r}; "
            "set one of them"
        )
    total_steps = count_steps(config.train, len(train_data))
    tx, schedule = optim.adam(total_steps=total_steps, **config.optim)
    trainer = Trainer(
        flow=flow,
        tx=tx,
        schedule=schedule,
        noise=noise,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        ema_decay=config.train.ema_decay,
        multipliers=config.optim.multipliers,
    )
    abstract = jax.eval_shape(_creation(config, trainer))
    abstract = jax.tree.map(
        lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
        abstract,
        sharding.state_shardings(mesh, abstract, config.mesh.rules),
    )
    return Run(config, trainer, mesh, train_data, test_data, total_steps, abstract)


def count_steps(train: Config, examples: int) -> int:
    """Steps of a training whose length is given as steps, epochs or images."""
    lengths = {name: train[name] for name in ("steps", "epochs", "images") if train[name]}
    if len(lengths) != 1 or min(lengths.values()) < 0:
        given = ", ".join(f"{name}={value}" for name, value in lengths.items())
        raise UsageError(
            "expected exactly one of config.train.steps, config.train.epochs and "
            "config.train.images above 0, but "
            + (f"got {given}; set the others to 0" if given else "all are 0; set one")
        )
    [(unit, length)] = lengths.items()
    images = {"steps": length * train.batch_size, "epochs": length * examples, "images": length}
    return math.ceil(images[unit] / train.batch_size)


def guidance_of(section: Config) -> Guidance:
    """The guidance that `config.eval` asks for."""
    return Guidance(
        scale=section.guidance,
        what=section.guide_what,
        temperature=section.attention_temperature,
        annealed=section.annealed,
    )


def _creation(config: Config, trainer: Trainer):
    return functools.partial(
        states.create,
        trainer.flow,
        trainer.tx,
        seed=config.train.seed,
        use_ema=config.train.ema_decay > 0,
    )


def _num_classes(config: Config, data: pipeline.Dataset) -> int:
    if not config.data.labels:
        if config.noise.label_drop:
            raise UsageError(
                f"config.noise.label_drop is {config.noise.label_drop}, but the flow has no labels;"
                " set config.data.labels=True, or the drop to 0"
            )
        return 0
    if not data.num_classes:
        raise UsageError(
            f"config.data.labels is True, but data set {data.name} has no labels; set it to False"
        )
    return data.num_classes


def _check_numbers(config: Config) -> None:
    for kind, (fields, holds) in _LIMITS.items():
        for name in fields:
            section, field = name.split(".")
            value = config[section].get(field)  # a flow has some of the fields
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UsageError(f"config.{name} is {value}; expected {kind}")


_LIMITS: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "1 or more": (
        ("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "eval.draws",
         "eval.samples", "flow.width", "flow.num_couplings", "flow.block_depth",
         "flow.num_blocks"),
        lambda value: value >= 1,
    ),
    f"0 to {LARGEST_SEED}": (("train.seed",), lambda value: 0 <= value <= LARGEST_SEED),
    "0 or more": (
        ("data.workers", "train.eval_every", "train.keep_every", "train.sample_every",
         "optim.min_lr", "optim.weight_decay", "optim.clip_norm", "eval.guidance",
         "eval.temperature"),
        lambda value: value >= 0,
    ),
    "a finite number above 0": (
        ("optim.lr", "optim.eps", "flow.pixel_scale"),
        lambda value: value > 0,
    ),
    "a finite number above 1": (("flow.scale_factor",), lambda value: value > 1),
    "0 <= value < 1": (
        ("train.ema_decay", "optim.b1", "optim.b2"),
        lambda value: 0 <= value < 1,
    ),
}  # fmt: skip
