"""What a run needs on a TPU slice, and how long it takes at best: before it is paid for.

The programs are those of training, evaluation and sampling, compiled for devices that need not be
there.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from jetflow import sharding
from jetflow.data import dataset as pipeline
from jetflow.data.facts import FACTS
from jetflow.evals import likelihoods as bpd
from jetflow.nn.transformer import REMAT_POLICIES
from jetflow.tools.plan import costs
from jetflow.tools.plan import devices as tpus
from jetflow.tools.plan.collectives import BETWEEN_SLICES
from jetflow.tools.plan.devices import Tpu
from jetflow.training.experiment import Run, set_up
from jetflow.types import Config, UsageError

PROGRAMS = ("train", "sample", "eval")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        params, optimizer, ema: the training state's parts; of sampling and evaluation, the weights.
        other: the batch, the flow's constants, and the program itself.
        temporaries: activations, gradients, buffers: what the compiler allocates beside them; None
            where it gave up.
        total: of all at the moment when most is in use, as the compiler counts it, with padding.
        capacity: what a program may take.
    """

    params: int
    optimizer: int
    ema: int
    other: int | None
    temporaries: int | None
    total: int
    capacity: int

    @property
    def spare(self) -> int:
        """Negative where it does not fit."""
        return self.capacity - self.total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step, by each resource alone, and by the scarcest of them: estimates.

    Attributes:
        compute: the program's matrix products at the peak rate of bfloat16.
        hbm: bytes to and from main memory.
        ici: exchanges within a slice, over all links.
        dcn: exchanges between slices.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound_by(self) -> str:
        seconds = dataclasses.asdict(self)
        return max(seconds, key=seconds.__getitem__)

    @property
    def seconds(self) -> float:
        return getattr(self, self.bound_by)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs on a topology.

    Attributes:
        what: one of `PROGRAMS`.
        topology, slices: "v5e:4x4", and how many of it.
        devices, mesh: their number and layout.
        batch_size, remat: of the program.
        parameters: of the flow.
        memory: on each device.
        model_flops: of a step on each device, by formula, nothing computed twice.
        cost: of the compiled program; None where it does not fit.
        roofline: None where it does not fit.
        steps: of the training; of an evaluation, or as many samples, otherwise.
        sequential: tokens that a step decodes one after another.
    """

    what: str
    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    parameters: int
    memory: Memory
    model_flops: float
    cost: costs.Cost | None
    roofline: Roofline | None
    steps: int
    sequential: int

    @property
    def fits(self) -> bool:
        return self.cost is not None

    @property
    def images_per_second(self) -> float:
        """At most: an estimate."""
        return self.batch_size / self.roofline.seconds if self.roofline else 0.0

    @property
    def days(self) -> float:
        """Of all the steps, at least: an estimate."""
        return self.steps * self.roofline.seconds / 86400 if self.roofline else math.inf


def load(name: str, split: str) -> pipeline.Dataset:
    """As `pipeline.load`, but of the papers' data sets the sizes alone: there are no images."""
    if name not in FACTS:
        return pipeline.load(name, split)
    facts = FACTS[name]
    images = range(facts.examples(split))
    return pipeline.Dataset(name, "", split, facts.image_shape, facts.num_classes, images)


def plan(config: Config, topology: str, *, slices: int = 1, what: str = "train") -> Plan:
    """Compile one program of a run for a topology, and read off what it needs.

    Raises:
        UsageError: on a config or a topology that cannot work; too little memory is none.
    """
    if what not in PROGRAMS:
        raise UsageError(f"--what is {what!r}; expected one of {', '.join(PROGRAMS)}")
    tpu = tpus.find(topology)
    run = set_up(config, load, tpus.devices(topology, slices))
    lowered, batch_size, passes = _program(run, what)
    state = run.abstract_state
    held = (state.params, state.opt_state, state.ema) if what == "train" else (state.variables(),)
    sizes = [*map(sharding.bytes_per_device, held), 0, 0]
    parts: dict[str, int] = dict(zip(("params", "optimizer", "ema"), sizes, strict=False))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _bytes_needed(str(error))
        memory = Memory(**parts, other=None, temporaries=None, total=needed, capacity=tpu.hbm_bytes)
        cost = roofline = None
    else:
        memory = _memory(compiled, parts, tpu)
        cost = costs.cost(compiled.as_text(), run.mesh.size, slices)
        roofline = _roofline(cost, tpu)
    flow = run.trainer.flow
    tokens = flow.latent_shape[0]
    forward = costs.forward_flops(state.params, tokens)
    return Plan(
        what=what,
        topology=topology,
        slices=slices,
        devices=run.mesh.size,
        mesh=dict(run.mesh.shape),
        batch_size=batch_size,
        remat=config.flow.remat,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        memory=memory,
        model_flops=passes * forward * batch_size / run.mesh.size,
        cost=cost,
        roofline=roofline,
        steps=run.total_steps if what == "train" else math.ceil(len(run.test_data) / batch_size),
        sequential=flow.decoded_blocks * (tokens - 1) if what == "sample" else 0,
    )


def fit(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    what: str = "train",
    say: Callable[[str], None] = lambda text: None,
) -> list[Plan]:
    """For each remat policy, the plan of the largest batch that fits, if any does.

    Tried are 1, 2, 3, 4, 6, 8, 12, 16, … images on each device at a time, from what the config has
    on, up or down.

    Args:
        say: gets a line about each try.
    """
    policies = REMAT_POLICIES if what == "train" else (config.flow.remat,)
    axes = {name: config.mesh[name] for name in sharding.AXES}
    mesh = sharding.make_mesh(**axes, devices=tpus.devices(topology, slices))
    parts = sharding.batch_parts(mesh)
    smallest = {"train": parts * config.train.accumulation, "eval": parts}
    section = "train" if what == "train" else "eval"
    rows = smallest.pop(section)

    def attempt(policy: str, size: int) -> Plan:
        changed = copy.deepcopy(config)
        changed.flow.remat = policy
        changed[section].batch_size = size * rows
        for other, fewest in smallest.items():
            changed[other].batch_size = fewest
        found = plan(changed, topology, slices=slices, what=what)
        state = f"{found.memory.total / 2**30:.2f} of {found.memory.capacity / 2**30:.2f} GiB"
        say(f"remat {policy}, {size} images a device: {state}")
        return found

    found = []
    for policy in policies:
        tried: dict[int, Plan] = {}

        def fits(size: int, policy: str = policy, tried: dict[int, Plan] = tried) -> bool:
            tried[size] = attempt(policy, size)
            return tried[size].fits

        if size := _largest(fits, start=config[section].batch_size // rows):
            found.append(tried[size])
    return found


def _largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest size of 1, 2, 3, 4, 6, 8, 12, … that fits, 0 for none."""
    size = 2 ** max(0, start.bit_length() - 1)
    if fits(size):
        while fits(2 * size):
            size *= 2
    else:
        size //= 2
        while size and not fits(size):
            size //= 2
    between = 3 * size // 2
    return between if size > 1 and fits(between) else size


def _program(run: Run, what: str) -> tuple[Any, int, int]:
    """A program, its batch size, and what it computes in forward passes."""
    batch_size = run.config.train.batch_size if what == "train" else run.config.eval.batch_size
    batch = run.abstract_batch(batch_size)
    flow, weights = run.trainer.flow, run.abstract_state.variables()
    if what == "train":
        return run.lower_step(run.abstract_state, batch), batch_size, 3  # backward is two
    if what == "eval":
        return bpd.lower(flow, weights, batch, run.mesh), batch_size, 1
    sampler = run.sampler(weights)
    split = sharding.batch_sharding(run.mesh)
    z = jax.ShapeDtypeStruct((batch_size, *flow.latent_shape), "float32", sharding=split)
    passes = (1 if sampler.guidance is None else 2) + (2 if sampler.denoise else 0)
    return sampler.lower(z, batch.label if flow.num_classes else None), batch_size, passes


def _memory(compiled: jax.stages.Compiled, parts: dict[str, int], tpu: Tpu) -> Memory:
    """At the moment when most of it is in use."""
    analysis: Any = compiled.memory_analysis()
    inputs = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.peak_memory_in_bytes - inputs - outputs
    total = costs.peak_bytes(compiled)
    return Memory(
        **parts,
        other=total - temporaries - sum(parts.values()),
        temporaries=temporaries,
        total=total,
        capacity=tpu.hbm_bytes,
    )


def _roofline(cost: costs.Cost, tpu: Tpu) -> Roofline:
    sent = {False: 0.0, True: 0.0}
    for collective in cost.collectives:
        sent[collective.kind.endswith(BETWEEN_SLICES)] += collective.bytes
    return Roofline(
        compute=cost.flops / tpu.flops,
        hbm=cost.hbm_bytes / tpu.hbm_bandwidth,
        ici=sent[False] / tpu.ici_bandwidth,
        dcn=sent[True] / tpu.dcn_bandwidth,
    )


def _bytes_needed(message: str) -> int:
    """From the compiler's complaint about too little memory; raises any other one."""
    found = re.search(r"(?:Used|temporaries \() ?([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(f"the program does not compile: {message[:2000]}")
    return int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))
