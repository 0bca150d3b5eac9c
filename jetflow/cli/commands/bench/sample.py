"""`jetflow bench sample`: how fast a flow draws images on this machine."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh

from jetflow import sharding
from jetflow.cli import commands
from jetflow.cli import configs as config
from jetflow.cli.commands import decoding
from jetflow.model import Model, load_model
from jetflow.sampling.ancestral import Sampler
from jetflow.sampling.decoding import METHODS
from jetflow.tools.bench import sampling
from jetflow.tools.plan import roofline as plan
from jetflow.training.experiment import set_up
from jetflow.training.step import abstract_variables, init_variables
from jetflow.types import Guidance, UsageError

USAGE = "jetflow bench sample --workdir runs/tar32 --batch_sizes 8,64 --methods cached,jacobi"


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
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
    mesh = commands.mesh(values)
    model = _model(values, mesh)
    guidance = Guidance(values.guidance, temperature=values.attention_temperature)
    sampler = Sampler(model.flow, model.variables, guidance=guidance, mesh=mesh)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if not values.json:
        of = "random weights of --config" if values.config else model.workdir
        print(f"sampling from step {model.step} of {of} on {device}")
        print("method    batch  images/s  ms/image      MB  sweeps (tokens a sweep)")
    for size in sizes:
        sharding.check_batch("--batch_sizes", size, mesh)
        for method in values.methods if model.flow.decoded_blocks else ["cached"]:
            chosen = decoding.with_method(sampler, method, values, model, size)
            speed = sampling.measure(chosen, method, size, values.repeats)
            print(json.dumps({"device": device, **dataclasses.asdict(speed)}) if values.json
                  else _line(speed), flush=True)  # fmt: skip
    return 0


def _model(values: flags.FlagValues, mesh: Mesh) -> Model:
    """The trained flow of --workdir, or the one of --config before its training.

    Token by token takes as long whatever the weights are, while windows settle at once where tokens
    do not yet depend on each other.
    """
    if values.config is None:
        workdir = Path(commands.required(values, "workdir", "runs/NAME"))
        return load_model(workdir, values.step, mesh)
    if values.methods != ["cached"]:
        raise UsageError(
            "--methods other than cached depend on the weights, and those of --config are random; "
            "give --workdir of a trained flow, or --methods cached"
        )
    run = set_up(values.config, plan.load)
    flow = run.trainer.flow
    abstract = abstract_variables(flow)
    where = sharding.state_shardings(mesh, abstract, values.config.mesh.rules)
    variables = jax.jit(functools.partial(init_variables, flow), out_shardings=where)(
        jax.random.key(0)
    )
    return Model(Path(), run.resolved_config, flow, variables, 0, mesh)


def _line(speed: sampling.Speed) -> str:
    sweeps = ", ".join(
        f"{sweeps} ({min(window, tokens)})"
        for sweeps, window, tokens in zip(
            speed.sweeps, speed.windows, speed.token_by_token, strict=True
        )
    )
    return (
        f"{speed.method:8}  {speed.batch_size:5}  {speed.images_per_second:8.2f}  "
        f"{speed.ms_per_image:8.1f}  {speed.peak_bytes / 1e6:6,.0f}  {sweeps}"
    )
