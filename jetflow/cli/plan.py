"""`jetflow plan`: what a run needs on a TPU slice, from a machine without one."""

import dataclasses
import json
import sys

import jax

from jetflow.cli.flags import Command
from jetflow.options import Options, option
from jetflow.tools.plan import roofline
from jetflow.tools.plan.roofline import Plan
from jetflow.types import Config, UsageError

RESOURCES = {"compute": "matrix products", "hbm": "memory", "ici": "links", "dcn": "between slices"}
REMEDIES = (
    "what may help: --fit, --config.flow.remat=full, --config.train.accumulation, and "
    "--config.mesh.data=1 --config.mesh.fsdp=-1"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    config: Config = option(example="configs/NAME.py")
    topology: str = option(
        help="GENERATION:SHAPE, in chips: v5e:4x4, v5p:4x4x4",
        example="GENERATION:SHAPE, as in v5e:4x4",
    )
    slices: int = option(1, "number of slices of that topology, joined by data", least=1)
    what: str = option("train", "the program", choices=roofline.PROGRAMS)
    fit: bool = option(False, "search the largest batch that fits, for each remat policy")
    json: bool = option(False, "print JSON")


def run(options: PlanOptions) -> None:
    jax.config.update("jax_platforms", "cpu")  # which leaves a TPU of this machine alone
    arguments = (options.config, options.topology)
    settings = {"slices": options.slices, "program": options.what}
    if not options.fit:
        plans = [roofline.plan(*arguments, **settings)]
    elif not (plans := roofline.fit(*arguments, **settings, progress=_show)):
        raise UsageError(
            f"not even one image a device fits {options.topology}; take more chips, and split the "
            "state over them with --config.mesh.fsdp=-1 --config.mesh.data=1"
        )
    if options.json:
        records = [dataclasses.asdict(plan) for plan in plans]
        print(json.dumps(records if options.fit else records[0], indent=2))
    else:
        print("\n\n".join(map(describe, plans)))


def describe(plan: Plan) -> str:
    """A plan for a person."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    slices = f"{plan.slices} slices of " if plan.slices > 1 else ""
    lines = [
        f"{plan.program}: {plan.parameters:,} parameters, batch {plan.batch_size} "
        f"({_each(plan)} a device), remat {plan.remat}",
        f"on {slices}{plan.topology}: {plan.devices} devices" + (f" ({axes})" if axes else ""),
        "",
        *_memory_lines(plan),
        "",
        f"FLOPs of a step on each device, by formula     {_si(plan.model_flops)}",
    ]
    return "\n".join([*lines, *(_cost_lines(plan) if plan.fits else ["", REMEDIES])])


def _each(plan: Plan) -> int:
    return plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = {
        "parameters" if plan.program == "train" else "weights": memory.params,
        "optimizer": memory.optimizer,
        "averaged parameters": memory.ema,
        "batch, constants, program": memory.other,
        "temporaries": memory.temporaries,
    }
    verdict, rest = ("fits, with", "to spare") if plan.fits else ("DOES NOT FIT, by", "too much")
    return [
        "memory on each device, GiB",
        *(f"  {name:26}{size / 2**30:9.2f}" for name, size in parts.items() if size),
        f"  {'in all':26}{memory.total / 2**30:9.2f} of {memory.capacity / 2**30:.2f}: {verdict} "
        f"{abs(memory.spare) / 2**30:.2f} {rest}",
    ]


def _cost_lines(plan: Plan) -> list[str]:
    cost, estimate = plan.cost, plan.estimate
    assert cost and estimate
    seconds = estimate.seconds_by_resource.items()
    times = ", ".join(f"{RESOURCES[name]} {_ms(value)}" for name, value in seconds if value)
    lines = [
        f"  of the compiled program, recomputation too   {_si(cost.flops)}",
        f"bytes to and from its memory                   {_si(cost.hbm_bytes)}",
        "sent by each device" + (", in bytes" if cost.collectives else ": nothing"),
        *(f"  {one.kind:34}{one.count:9,} x     {_si(one.bytes)}" for one in cost.collectives),
        "",
        f"estimate (roofline), ms a step: {times}",
        f"  no faster than {_ms(estimate.step_seconds)} ms a step, bound by "
        f"{RESOURCES[estimate.bound_by]}: at most {estimate.images_per_second:,.0f} images/s; "
        f"{plan.steps:,} steps take {_length(estimate.days)} or more",
    ]
    if plan.sequential:
        lines.append(
            f"  a step decodes {plan.sequential:,} tokens one after another; what each of these "
            "waits for the last is not in the estimate"
        )
    if cost.unknown_loops:
        lines.append(f"{cost.unknown_loops} loops of unknown length count as if they ran once")
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def _length(days: float) -> str:
    for unit, share in (("days", 1), ("hours", 24), ("minutes", 1440)):
        if days * share >= 1:
            return f"{days * share:.1f} {unit}"
    return f"{days * 86400:.1f} seconds"


def _si(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:8.2f} {prefix}"
    return f"{number:8.2f}"


def _show(plan: Plan) -> None:
    state = f"{plan.memory.total / 2**30:.2f} of {plan.memory.capacity / 2**30:.2f} GiB"
    text = f"remat {plan.remat}, {_each(plan)} images a device: {state}"
    print(text, file=sys.stderr, flush=True)


COMMAND = Command(
    "jetflow plan --config configs/imagenet64_jet.py:64x5 --topology v5e:4x4", PlanOptions, run
)
