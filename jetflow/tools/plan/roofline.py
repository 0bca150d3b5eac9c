"""What a run needs on TPUs or GPUs, and the least time that it takes: before it is paid for.

The programs are those of training, evaluation and sampling, compiled for absent devices.
"""

import bisect
import copy
import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jetflow import configs, sharding
from jetflow.data import dataset, sources
from jetflow.evals import likelihoods
from jetflow.flows.stack import Stack, guidance_of
from jetflow.nn.transformer import REMAT_POLICIES
from jetflow.tools.plan import costs, devices, estimates
from jetflow.tools.plan.devices import Accelerator
from jetflow.training.experiment import Run, set_up
from jetflow.types import Config, Flow, Guidance, UsageError

PROGRAMS = ("train", "sample", "eval")
SWEEPS = 0.15  # of decoding by windows, as a share of the tokens


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device; `other` and `temporaries` are None where the compiler gave up."""

    params: int  # or the weights, in programs without a training state
    optimizer: int
    ema: int
    other: int | None  # the batch, the flow's constants, and the program itself
    temporaries: int | None  # activations, gradients and buffers
    total: int  # at the moment of largest use, as the compiler counts it, with padding
    capacity: int  # the most that a program may take
    spare: int  # negative where the program does not fit


class _Lowered(NamedTuple):
    """A program before it is compiled."""

    program: jax.stages.Lowered
    passes: float  # forward passes over all tokens, of which a backward pass is worth two
    window: int = 0  # see `Plan`
    sweeps: int = 1  # of each block
    drawn: str = ""  # see `Plan`


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs on a topology; without cost and estimate where it does not fit."""

    program: str  # one of `PROGRAMS`
    topology: str  # such as "v5e:4x4"
    slices: int  # of that topology
    chips: int  # of TPUs, or GPUs
    devices: int  # as JAX counts them: a chip of tpu7x is two
    mesh: dict[str, int]
    batch_size: int
    remat: str
    dtype: str  # of the nets
    precision: str  # of their products; what these come to is in the cost
    attention: str  # the form that is taken, and why
    drawn: str  # of samples: guidance, denoising and decoding, in words
    parameters: int  # of the flow
    memory: Memory
    model_flops: float  # of a step on each device, by formula, without recomputation
    steps: int  # of the training; otherwise of an evaluation, or of as many samples
    sequential: int  # evaluations of the blocks' nets, one after another, in decoding a TarFlow
    window: int  # tokens in each of these; 0 where nothing is decoded
    fits: bool
    cost: costs.Cost | None  # of the compiled program
    estimate: estimates.Estimate | None


def load(name: str, split: str) -> dataset.Dataset:
    """As `dataset.load`, but of published data sets the sizes alone, without images."""
    source = sources.find(name)
    if not source.splits:
        return dataset.load(name, split, data_cache_gb=0.0)  # nothing is copied
    images = range(source.count(split))
    return dataset.Dataset(name, "", split, source.image_shape, source.num_classes, images)


def plan(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    program: str = "train",
    sweeps: float = SWEEPS,
    price: float | None = None,
    **decoding: Any,
) -> Plan:
    """Compile one program of a run for a topology, and read off what it needs.

    Args:
        sweeps: of each block in sampling by windows, as a share of the tokens: it depends on the
            weights, and the program does not fix it.
        price: of a chip-hour, in any currency, for the costs of the estimate's budgets.
        decoding: fields of `SamplingOptions` for sampling, such as `method` and `window`.

    Raises:
        UsageError: on a config or a topology that cannot work. A program that does not fit is no
            error.
    """
    if program not in PROGRAMS:
        raise UsageError(f"program is {program!r}; expected one of {', '.join(PROGRAMS)}")
    accelerator = devices.find(topology)
    run = set_up(config, load, devices.devices(topology, slices))
    section = config.train if program == "train" else config.eval
    flow, size, chips = run.trainer.flow, section.batch_size, devices.chips(topology, slices)
    with devices.compiling(accelerator):
        lowered = _lower(run, program, size, sweeps, decoding)
        memory, cost = _compile(lowered, run, program, accelerator, slices, sweeps)
    tokens = flow.latent_shape[0]
    params = run.abstract_state.params
    test_steps = math.ceil(len(run.test_data) / size)
    steps = run.total_steps if program == "train" else test_steps
    model_flops = lowered.passes * costs.forward_flops(params, tokens) * size / run.mesh.size
    facts = (accelerator, model_flops, size, steps, chips, price)
    return Plan(
        program=program,
        topology=topology,
        slices=slices,
        chips=chips,
        devices=run.mesh.size,
        mesh=dict(run.mesh.shape),
        batch_size=size,
        remat=config.flow.remat,
        dtype=config.flow.dtype,
        precision=config.flow.precision,
        attention=str(run.attention),
        drawn=lowered.drawn,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        memory=memory,
        model_flops=model_flops,
        steps=steps,
        sequential=flow.decoded_blocks * lowered.sweeps if lowered.window else 0,
        window=lowered.window,
        fits=cost is not None,
        cost=cost,
        estimate=estimates.estimate(cost, *facts) if cost else None,
    )


def fit(
    config: Config,
    topology: str,
    *,
    program: str = "train",
    progress: Callable[[str, int, Plan | None], None] = lambda *_: None,
    **settings: Any,
) -> list[Plan]:
    """For each remat policy, the plan of the largest batch that fits, if any; fastest first.

    Tried are 1, 2, 3, 4, 6, 8, 12, 16, … images on each device at a time, up to the data set: first
    the batch of the config, then what its memory lets expect.

    Args:
        progress: called with the policy, the images on each device and None before each plan is
            compiled, which may take minutes, and with the plan after it.
        settings: of `plan`.
    """
    configs.check(config)
    policies = REMAT_POLICIES if program == "train" else (config.flow.remat,)
    axes = {name: config.mesh[name] for name in sharding.AXES}
    found = devices.devices(topology, settings.get("slices", 1))
    mesh = sharding.make_mesh(**axes, devices=found)
    parts = sharding.batch_parts(mesh)
    rows = {"train": parts * config.train.accumulation, "eval": parts}
    section, split = ("train", "train_split") if program == "train" else ("eval", "test_split")
    most = max(1, len(load(config.data.name, config.data[split])) // rows[section])
    largest = []
    for policy in policies:
        tried: dict[int, Plan] = {}

        def used(size: int, policy: str = policy, tried: dict[int, Plan] = tried) -> float:
            changed = copy.deepcopy(config)
            changed.flow.remat = policy
            for name, least in rows.items():
                changed[name].batch_size = least * (size if name == section else 1)
            each = changed[section].batch_size // parts
            progress(policy, each, None)
            tried[size] = plan(changed, topology, program=program, **settings)
            progress(policy, each, tried[size])
            memory = tried[size].memory
            state = memory.params + memory.optimizer + memory.ema
            return (memory.total - state) / max(1, memory.capacity - state)

        if size := _largest(used, config[section].batch_size // rows[section], most):
            largest.append(tried[size])
    return sorted(largest, key=operator.attrgetter("estimate.images_per_second"), reverse=True)


def _largest(used: Callable[[int], float], start: int, most: int) -> int:
    """The largest size of 1, 2, 3, 4, 6, 8, 12, … `most` that fits, 0 for none.

    Args:
        used: the share that a size takes of the memory for it, about in proportion to the size.
    """
    used = functools.cache(used)
    sizes = sorted({power * factor for power in (2**n for n in range(40)) for factor in (1, 3)})
    sizes = [size for size in sizes if size <= most]
    index, last, share = max(0, bisect.bisect_right(sizes, start) - 1), 0, 0.0
    for _ in range(3):  # along the line through the last two sizes that were tried
        size = sizes[index]
        slope = (used(size) - share) / (size - last)
        if slope <= 0:
            break
        guess = min(16 * size, size + (1 - used(size)) / slope)
        last, share = size, used(size)
        index = max(0, bisect.bisect_right(sizes, guess) - 1)
        if sizes[index] == last:
            break
    while index >= 0 and used(sizes[index]) > 1:
        index -= 1
    while 0 <= index < len(sizes) - 1 and used(sizes[index + 1]) <= 1:
        index += 1
    return sizes[index] if index >= 0 else 0


def _lower(
    run: Run, program: str, batch_size: int, sweeps: float, decoding: dict[str, Any]
) -> _Lowered:
    batch = run.abstract_batch(batch_size)
    flow, weights = run.trainer.flow, run.abstract_state.variables()
    noise = run.trainer.noise.of_data(run.train_data.image_shape)
    if program == "train":
        return _Lowered(run.lower_step(run.abstract_state, batch), 3)
    if program == "eval":
        return _Lowered(likelihoods.lower(flow, weights, batch, run.mesh, noise), 1)
    sampler = run.sampler(weights, **decoding)
    split = sharding.batch_sharding(run.mesh)
    z = jax.ShapeDtypeStruct((batch_size, *flow.latent_shape), "float32", sharding=split)
    lowered = sampler.lower(z, batch.label if flow.num_classes else None)
    passes = 1 + _guided_share(flow, sampler.guidance)
    steps = flow.latent_shape[0] - 1
    window = min(sampler.decoding[0].window, steps) if sampler.decoding else 0
    if window > 1:
        steps = max(1, math.ceil(sweeps * steps))
        passes *= steps * window / flow.latent_shape[0]
    drawn = [f"guidance {sampler.guidance.scale}"] if sampler.guidance else ["no guidance"]
    steps_of_score = len(sampler.denoise.levels) if sampler.denoise else 0
    drawn += [f"denoised in {steps_of_score} steps"] if steps_of_score > 1 else []
    drawn += ["denoised"] if steps_of_score == 1 else []
    if sampler.decoding:
        drawn += [f"windows of {window} tokens" if window > 1 else "token by token"]
        drawn += [f"cache in {sampler.decoding[0].cache_dtype or run.config.flow.dtype}"]
    passes += 2 * steps_of_score
    return _Lowered(lowered, passes, window, steps, ", ".join(drawn))


def _guided_share(flow: Flow, guidance: Guidance | None) -> float:
    """The share of the layers that are computed a second time, without a label."""
    assert isinstance(flow, Stack)
    layers = [block.net.num_layers for block in flow.blocks]  # type: ignore[attr-defined]
    guided = [guidance_of(flow, number, guidance) is not None for number in range(len(layers))]
    return sum(itertools.compress(layers, guided)) / sum(layers)


def _compile(
    lowered: _Lowered, run: Run, program: str, accelerator: Accelerator, slices: int, sweeps: float
) -> tuple[Memory, costs.Cost | None]:
    """The memory of a program, and its cost where it fits."""
    state = run.abstract_state
    held = [state.params, state.opt_state, state.ema]
    if program != "train":
        held = [state.variables(), (), ()]
    params, optimizer, ema = map(sharding.bytes_per_device, held)
    other = temporaries = cost = None
    capacity = accelerator.capacity
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        total = _bytes_needed(str(error))
    else:
        analysis: Any = compiled.memory_analysis()
        total = sharding.peak_bytes(compiled)
        held = analysis.argument_size_in_bytes + analysis.generated_code_size_in_bytes
        held += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        temporaries = total - held
        other = held - params - optimizer - ema
        if total <= capacity:  # for GPUs, programs compile that do not fit
            hosts = {device.process_index for device in run.mesh.devices.flat}
            nodes = len(hosts) if accelerator.chip else 1
            cost = costs.cost(compiled.as_text() or "", run.mesh.size, slices, nodes, sweeps)
    memory = Memory(params, optimizer, ema, other, temporaries, total, capacity, capacity - total)
    return memory, cost


def _bytes_needed(message: str) -> int:
    """Read off the compiler's message about too little memory; raises any other one."""
    used = re.search(r"(?:Used|temporaries \() ?([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or not used:
        raise RuntimeError(f"the program does not compile: {message[:2000]}")
    return int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))))
