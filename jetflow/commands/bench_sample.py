"""`jetflow bench sample`: how fast a trained flow draws images on this machine."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from jetflow import bench, commands, sharding
from jetflow.commands import decoding
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS
from jetflow.types import Guidance, UsageError
from jetflow.workdir import load_model

USAGE = "jetflow bench sample --workdir runs/tar32 --batch_sizes 8,64 --methods cached,jacobi"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    commands.define_workdir(values)
    commands.define_step(values)
    commands.define_mesh(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_list, "batch_sizes", ["8", "64"], "images made at a time")
    flag(flags.DEFINE_list, "methods", list(METHODS), "some of cached, jacobi and auto")
    flag(flags.DEFINE_float, "guidance", 0.0, "strength of guidance", lower_bound=0.0)
    flag(flags.DEFINE_float, "attention_temperature", 1.0, "of guidance's unconditional pass")
    decoding.define(values)


def run(values: flags.FlagValues) -> int:
    sizes = [commands.whole_number("batch_sizes", size) for size in values.batch_sizes]
    for method in values.methods:
        if method not in (*METHODS, "auto"):
            raise UsageError(f"--methods has {method!r}; expected some of cached, jacobi and auto")
    workdir = Path(commands.required(values, "workdir", "runs/NAME"))
    mesh = commands.mesh(values)
    model = load_model(workdir, values.step, mesh)
    guidance = Guidance(values.guidance, temperature=values.attention_temperature)
    sampler = Sampler(model.flow, model.variables, guidance=guidance, mesh=mesh)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if not values.json:
        print(f"sampling from step {model.step} of {model.workdir} on {device}")
        print("method    batch  images/s  ms/image      MB  sweeps (tokens a sweep)")
    for size in sizes:
        sharding.check_batch("--batch_sizes", size, mesh)
        for method in values.methods if model.flow.decoded_blocks else ["cached"]:
            chosen = decoding.with_method(sampler, method, values, model, size)
            speed = bench.sampling(chosen, method, size, values.repeats)
            print(json.dumps({"device": device, **dataclasses.asdict(speed)}) if values.json
                  else _line(speed), flush=True)  # fmt: skip
    return 0


def _line(speed: bench.Speed) -> str:
    sweeps = ", ".join(
        f"{sweeps} ({window})" for sweeps, window in zip(speed.sweeps, speed.windows, strict=True)
    )
    return (
        f"{speed.method:8}  {speed.batch_size:5}  {speed.images_per_second:8.2f}  "
        f"{speed.ms_per_image:8.1f}  {speed.peak_bytes / 1e6:6,.0f}  {sweeps}"
    )
