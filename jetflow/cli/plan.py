"""`jetflow plan`: what a run needs on TPUs or GPUs, from a machine without them."""

import dataclasses
import json
import sys
from typing import Any

import jax

from jetflow.cli.flags import Command
from jetflow.nn.attention import KERNELS
from jetflow.options import Options, option
from jetflow.sampling.decoding import CACHE_DTYPES, METHODS, WINDOW
from jetflow.tools.plan import roofline
from jetflow.tools.plan.roofline import Plan
from jetflow.tools.report.document import columns, text
from jetflow.types import Config, UsageError

RESOURCES = {"compute": "matrix products", "hbm": "memory", "links": "links", "network": "network"}
OF_SAMPLING, OF_WINDOWS = ("method", "cache_dtype"), ("window", "sweeps")
REMEDIES = (
    "what may help: --fit, --config.flow.remat=full, --config.train.accumulation, and "
    "--config.mesh.data=1 --config.mesh.fsdp=-1"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    config: Config = option(example="configs/NAME.py")
    topology: str = option(
        help="GENERATION:SHAPE; TPUs in chips: v5e:4x4; GPUs in nodes x GPUs: h100:8, h100:2x8",
        example="GENERATION:SHAPE, as in v5e:4x4",
    )
    slices: int = option(1, "number of slices of that topology of TPUs, joined by data", least=1)
    what: str = option("train", "the program", choices=roofline.PROGRAMS)
    fit: bool = option(False, "find the remat policy and batch of most images a second")
    method: str = option("cached", "with --what sample: how a TarFlow is inverted", choices=METHODS)
    window: int = option(WINDOW, "with --method jacobi: tokens a sweep", least=1)
    sweeps: float = option(
        roofline.SWEEPS, "with --method jacobi: sweeps of a block, as a share of its tokens",
        least=0.0, most=1.0,
    )  # fmt: skip
    cache_dtype: str | None = option(
        None,
        "with --what sample: of cached keys and values; default: the net's",
        choices=CACHE_DTYPES,
    )
    price: float | None = option(
        None, "of an hour of a TPU chip or a GPU, in any currency: what the steps cost", least=0.0
    )
    json: bool = option(False, "print JSON")


def run(options: PlanOptions) -> None:
    jax.config.update("jax_platforms", "cpu")  # which leaves accelerators of this machine alone
    arguments = (options.config, options.topology)
    _refuse_idle(options, OF_SAMPLING, "--what sample", options.what == "sample")
    _refuse_idle(options, OF_WINDOWS, "--method jacobi", options.method == "jacobi")
    names = ("slices", "price", *OF_SAMPLING, *OF_WINDOWS)
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings["program"] = options.what
    if not options.fit:
        plans = [roofline.plan(*arguments, **settings)]
    elif not (plans := roofline.fit(*arguments, **settings, progress=_show)):
        raise UsageError(
            f"not even one image a device fits {options.topology}; take more chips, and split the "
            "state over them with --config.mesh.fsdp=-1 --config.mesh.data=1"
        )
    if options.json:
        records = [dataclasses.asdict(plan) for plan in plans]
        best = [record | {"best": record is records[0]} for record in records]
        print(json.dumps(best if options.fit else records[0], indent=2))
        return
    print("\n\n".join(map(describe, plans)))
    if options.fit:
        print(f"\nfastest: the first, remat {plans[0].remat} and batch {plans[0].batch_size}")


def _refuse_idle(options: PlanOptions, names: tuple[str, ...], without: str, used: bool) -> None:
    """Raise a UsageError on a flag that was given and has no effect."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in names and value != field.default and not used:
            raise UsageError(
                f"--{field.name} is {value!r}, which has no effect without {without}; leave it out"
            )


def describe(plan: Plan) -> str:
    """A plan for a person."""
    slices = f"{plan.slices} slices of " if plan.slices > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    return "\n".join(
        [f"{plan.program}: {plan.parameters:,} parameters, batch {plan.batch_size} "
         f"({_each(plan)} a device), remat {plan.remat}",
         f"nets in {plan.dtype}, precision {plan.precision}, attention {plan.attention}",
         *([plan.drawn] if plan.drawn else []),
         f"on {slices}{plan.topology}: {plan.devices} devices" + (f" ({mesh})" if mesh else ""),
         "", *_memory(plan), "", *(_cost(plan) if plan.fits else [REMEDIES])]
    )  # fmt: skip


def _each(plan: Plan) -> int:
    return plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = {
        "parameters" if plan.program == "train" else "weights": memory.params,
        "optimizer": memory.optimizer,
        "averaged parameters": memory.ema,
        "batch, constants, program": memory.other,
        "temporaries": memory.temporaries,
        f"in all, of {memory.capacity / 2**30:.2f}": memory.total,
    }
    verdict, rest = ("fits, with", "to spare") if plan.fits else ("DOES NOT FIT, by", "too much")
    rows = [[name, f"{size / 2**30:.2f}"] for name, size in parts.items() if size]
    return [
        columns(["memory on each device", "GiB"], rows),
        f"{verdict} {abs(memory.spare) / 2**30:.2f} GiB {rest}",
    ]


def _cost(plan: Plan) -> list[str]:
    cost, estimate = plan.cost, plan.estimate
    assert cost and estimate
    rows = {
        "FLOPs, by formula": _si(plan.model_flops),
        "FLOPs of the compiled program, recomputation too": _si(cost.flops),
    }
    for arithmetic, flops in cost.flops_by_arithmetic.items():
        rows[f"  of them in {arithmetic}"] = _si(flops)
    rows["bytes to and from its memory"] = _si(cost.hbm_bytes)
    sent = {f"bytes sent, {one.kind}, {one.count:,} times": _si(one.bytes)
            for one in cost.collectives}  # fmt: skip
    seconds = estimate.seconds_by_resource.items()
    times = ", ".join(f"{RESOURCES[name]} {text(1000 * value)}" for name, value in seconds if value)
    lines = [
        columns(["a step on each device", ""], list((rows | sent).items())),
        "",
        f"estimate (roofline), ms a step: {times}",
        f"  no faster than {text(1000 * estimate.step_seconds)} ms a step, bound by "
        f"{RESOURCES[estimate.bound_by]}: at most {estimate.images_per_second:,.0f} images/s",
        f"  the FLOPs of the formula are {estimate.peak_share:.0%} of what the devices could do in "
        "that time in bfloat16",
    ]
    lines += _differences(plan)
    if plan.sequential:
        each = "tokens" if plan.window == 1 else f"windows of {plan.window} tokens"
        lines.append(
            f"  a step evaluates {plan.sequential:,} {each} one after another; what each of these "
            "waits for the last is not in the estimate"
        )
    if cost.unknown_loops and plan.window < 2:
        lines.append(f"{cost.unknown_loops} loops of unknown length count as if they ran once")
    heading = f"{plan.steps:,} steps on {plan.chips:,} chips"
    names = {"days": "days", "chip_hours": "chip-hours", "cost": "cost"}
    rows = [[title, *(getattr(one, name) for one in estimate.budgets)]
            for name, title in names.items()]  # fmt: skip
    shares = [f"at {one.share:.0%} of the roofline" for one in estimate.budgets]
    known = [row for row in rows if row[1] is not None]
    return [*lines, "", columns([heading, *shares], known)]


def _differences(plan: Plan) -> list[str]:
    """Why the program's FLOPs are not those of the formula, where they differ by more than 15 %."""
    assert plan.cost
    ratio = plan.cost.flops / plan.model_flops
    if 0.85 <= ratio <= 1.15:
        return []
    reason = "for a reason unknown to this plan: do not rely on its estimate"
    if 1 < ratio < 1.4 and plan.program == "train" and plan.remat != "none":
        reason = f"as remat {plan.remat} recomputes them backwards"
    if 0.6 < ratio < 1 and plan.program != "sample" and plan.attention in KERNELS.values():
        reason = f"as {plan.attention} attention skips what is masked"
    if 0.6 < ratio < 1 and plan.program == "sample":
        reason = "as a token sees the cache of those before it alone"
    return [f"the program's FLOPs are {ratio:.2f} times those of the formula, {reason}"]


def _si(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.2f}"


def _show(remat: str, each: int, plan: Plan | None) -> None:
    state = "compiling"
    if plan:
        state = f"{plan.memory.total / 2**30:.2f} of {plan.memory.capacity / 2**30:.2f} GiB"
    print(f"remat {remat}, {each} images a device: {state}", file=sys.stderr, flush=True)


COMMAND = Command(
    "jetflow plan --config configs/imagenet64_jet.py:64x5 --topology v5e:4x4", PlanOptions, run
)
