"""`jetflow evaluate`: what a trained flow is worth, as JSON in its workdir."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from absl import flags
from jax.sharding import Mesh

from jetflow import commands, sharding
from jetflow.data import pipeline
from jetflow.evals import bpd
from jetflow.noise import LARGEST_SEED, Noise
from jetflow.types import UsageError
from jetflow.workdir import Model, load_model, write_result

USAGE = "jetflow evaluate --workdir runs/digits --metrics bpd"
ARGUMENTS = ()
METRICS = ("bpd", "noised_bpd")


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    commands.define_workdir(values)
    commands.define_step(values)
    commands.define_data_dir(values)
    commands.define_mesh(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_list, "metrics", ["bpd"],
         f"some of {','.join(METRICS)}: likelihood of dequantised images, or of images with "
         "the gaussian noise of training")  # fmt: skip
    flag(flags.DEFINE_string, "split", None, "default: the test split of the run's config")
    flag(flags.DEFINE_integer, "draws", None, "noise draws for each example; default: the run's",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_integer, "seed", 0, "of the draws", lower_bound=0, upper_bound=LARGEST_SEED)
    flag(flags.DEFINE_integer, "batch_size", 128, "images at a time; no effect but rounding errors",
         lower_bound=1)  # fmt: skip


def run(values: flags.FlagValues) -> int:
    workdir = Path(commands.required(values, "workdir", "runs/NAME"))
    check(values)
    mesh = commands.mesh(values)
    sharding.check_batch("--batch_size", values.batch_size, mesh)
    measure(values, load_model(workdir, values.step, mesh), mesh)
    return 0


def check(values: flags.FlagValues) -> None:
    """Raise a UsageError on flags that cannot work, whatever the model."""
    unknown = [metric for metric in values.metrics or [""] if metric not in METRICS]
    if unknown:
        raise UsageError(f"--metrics has {unknown[0]!r}; expected some of {', '.join(METRICS)}")


def measure(values: flags.FlagValues, model: Model, mesh: Mesh) -> list[dict[str, Any]]:
    """What the flags ask for of a model: measured, written, said and returned."""
    trained_with = Noise(**model.config["noise"])
    if "noised_bpd" in values.metrics and trained_with.kind == "uniform":
        raise UsageError("noised_bpd is for flows trained with gaussian noise; use --metrics bpd")
    data = model.config["data"]
    split = data["test_split"] if values.split is None else values.split
    if not data["name"]:
        raise UsageError(
            f"{model.workdir} names no data set; convert it again with --data NAME, to another "
            "--out"
        )
    dataset = pipeline.load(data["name"], split, data_dir=values.data_dir)
    draws = values.draws or model.config["eval"]["draws"]
    # The results of the run itself stay where they are.
    own = split, draws, values.seed
    is_own = own == (data["test_split"], model.config["eval"]["draws"], 0)
    suffix = "" if is_own else f"-{quote(split, safe='')}-draws{draws}-seed{values.seed}"
    results = []
    for metric in values.metrics:
        noise = bpd.UNIFORM if metric == "bpd" else trained_with
        likelihood = bpd.measure(
            model.flow, model.variables, dataset, mesh=mesh, noise=noise, seed=values.seed,
            draws=draws, batch_size=values.batch_size,
        )  # fmt: skip
        weights = "ema" if model.config["train"]["ema_decay"] else "params"
        result = bpd.record(likelihood, noise, dataset, step=model.step, weights=weights)
        print(f"step {model.step}: {bpd.describe(result)}")
        print(f"written to {write_result(model.workdir, result, suffix)}")
        results.append(result)
    return results
