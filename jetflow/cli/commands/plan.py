"""`jetflow plan`: what a run needs on a TPU slice, from a machine without one."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from jetflow.cli import commands
from jetflow.cli import configs as config
from jetflow.tools.plan import devices as tpus
from jetflow.tools.plan import roofline as plan
from jetflow.tools.plan.roofline import Plan
from jetflow.types import UsageError

USAGE = "jetflow plan --config configs/imagenet64_jet.py:64x5 --topology v5e:4x4"
ARGUMENTS = ()


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
    define = commands.definer(values)
    define(flags.DEFINE_string, "topology", None, "GENERATION:SHAPE, in chips: v5e:4x4, v5p:4x4x4")
    define(flags.DEFINE_integer, "slices", 1, "so many of that topology, joined by data")
    define(flags.DEFINE_enum, "what", "train", "the program", enum_values=plan.PROGRAMS)
    text = "search the largest batch that fits, for each remat policy"
    define(flags.DEFINE_boolean, "fit", False, text)
    define(flags.DEFINE_boolean, "json", False, "print JSON")


def run(values: flags.FlagValues) -> int:
    jax.config.update("jax_platforms", "cpu")  # which leaves a TPU of this machine alone
    experiment = commands.required(values, "config", "configs/NAME.py")
    topology = commands.required(values, "topology", "GENERATION:SHAPE, as in v5e:4x4")
    tpus.find(topology)
    options: dict[str, Any] = {"slices": values.slices, "what": values.what}
    if values.fit:
        plans = plan.fit(experiment, topology, **options, say=_say)
        if not plans:
            raise UsageError(
                f"not even one image a device fits {topology}; take more chips, and split the "
                "state over them with --config.mesh.fsdp=-1 --config.mesh.data=1"
            )
    else:
        plans = [plan.plan(experiment, topology, **options)]
    if values.json:
        records = [as_json(found) for found in plans]
        print(json.dumps(records if values.fit else records[0], indent=2))
    else:
        print("\n\n".join(describe(found) for found in plans))
    return 0


def as_json(found: Plan) -> dict[str, Any]:
    """All of a plan; what is an estimate is named so."""
    record = dataclasses.asdict(found)
    estimate = {}
    if roofline := found.roofline:
        estimate = {
            "seconds_by_resource": dataclasses.asdict(roofline),
            "bound_by": roofline.bound_by,
            "step_seconds": roofline.seconds,
            "images_per_second": found.images_per_second,
            "days": found.days,
        }
    del record["roofline"]
    record["memory"]["spare"] = found.memory.spare
    return {**record, "fits": found.fits, "estimate": estimate or None}


def describe(found: Plan) -> str:
    """A plan for a person."""
    axes = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    slices = f"{found.slices} slices of " if found.slices > 1 else ""
    each = found.batch_size // (found.mesh["data"] * found.mesh["fsdp"])
    lines = [
        f"{found.what}: {found.parameters:,} parameters, batch {found.batch_size} ({each} a "
        f"device), remat {found.remat}",
        f"on {slices}{found.topology}: {found.devices} devices" + (f" ({axes})" if axes else ""),
        "",
        *_memory_lines(found),
        "",
        f"FLOPs of a step on each device, by formula     {_si(found.model_flops)}",
    ]
    if not found.fits:
        lines += ["", "what may help: --fit, --config.flow.remat=full, --config.train.accumulation,"
                  " and --config.mesh.data=1 --config.mesh.fsdp=-1"]  # fmt: skip
    if (cost := found.cost) and found.roofline:
        lines += [
            f"  of the compiled program, recomputation too   {_si(cost.flops)}",
            f"bytes to and from its memory                   {_si(cost.hbm_bytes)}",
            *_collective_lines(found),
            "",
            *_estimate_lines(found),
        ]
        if cost.unknown_loops:
            lines.append(
                f"{cost.unknown_loops} loops of unknown length are counted as if they ran once"
            )
    return "\n".join(lines)


def _memory_lines(found: Plan) -> list[str]:
    memory = found.memory
    parts = {
        "parameters" if found.what == "train" else "weights": memory.params,
        "optimizer": memory.optimizer,
        "averaged parameters": memory.ema,
        "batch, constants, program": memory.other,
        "temporaries": memory.temporaries,
    }
    lines = [f"  {name:26}{size / 2**30:9.2f}" for name, size in parts.items() if size]
    verdict = "fits, with" if found.fits else "DOES NOT FIT, by"
    rest = "to spare" if found.fits else "too much"
    return [
        "memory on each device, GiB",
        *lines,
        f"  {'in all':26}{memory.total / 2**30:9.2f} of {memory.capacity / 2**30:.2f}: {verdict} "
        f"{abs(memory.spare) / 2**30:.2f} {rest}",
    ]


def _collective_lines(found: Plan) -> list[str]:
    assert found.cost
    if not found.cost.collectives:
        return ["sent by each device: nothing"]
    lines = ["sent by each device, in bytes"]
    for kind in found.cost.collectives:
        lines.append(f"  {kind.kind:34}{kind.count:9,} x     {_si(kind.bytes)}")
    return lines


def _estimate_lines(found: Plan) -> list[str]:
    assert found.roofline
    seconds = dataclasses.asdict(found.roofline)
    names = {"compute": "matrix products", "hbm": "memory", "ici": "links", "dcn": "between slices"}
    times = ", ".join(f"{names[key]} {_ms(value)}" for key, value in seconds.items() if value)
    lines = [
        f"estimate (roofline), ms a step: {times}",
        f"  no faster than {_ms(found.roofline.seconds)} ms a step, bound by "
        f"{names[found.roofline.bound_by]}: at most {found.images_per_second:,.0f} images/s; "
        f"{found.steps:,} steps take {_length(found.days)} or more",
    ]
    if found.sequential:
        lines.append(
            f"  a step decodes {found.sequential:,} tokens one after another; what each of these "
            "waits for the last is not in the estimate"
        )
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
