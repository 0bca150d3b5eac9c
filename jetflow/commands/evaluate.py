"""`jetflow evaluate`: what a trained flow is worth, as JSON in its workdir."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from absl import flags

from jetflow import commands, sharding
from jetflow.data import pipeline
from jetflow.evals import bpd
from jetflow.noise import LARGEST_SEED, Noise
from jetflow.types import UsageError
from jetflow.workdir import load_model, write_result

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
    unknown = [metric for metric in values.metrics or [""] if metric not in METRICS]
    if unknown:
        raise UsageError(f"--metrics has {unknown[0]!r}; expected some of {', '.join(METRICS)}")
    mesh = commands.mesh(values)
    sharding.check_batch("--batch_size", values.batch_size, mesh)
    model = load_model(workdir, values.step, mesh)
    trained_with = Noise(**model.config["noise"])
    if "noised_bpd" in values.metrics and trained_with.kind == "uniform":
        raise UsageError("noised_bpd is for flows trained with gaussian noise; use --metrics bpd")
    data = model.config["data"]
    split = data["test_split"] if values.split is None else values.split
    if not data["name"]:
        raise UsageError(
            f"{workdir} names no data set; convert it again with --data NAME, to another --out"
        )
    dataset = pipeline.load(data["name"], split, data_dir=values.data_dir)
    draws = values.draws or model.config["eval"]["draws"]
    # The results of the run itself stay where they are.
    own = split, draws, values.seed
    is_own = own == (data["test_split"], model.config["eval"]["draws"], 0)
    suffix = "" if is_own else f"-{quote(split, safe='')}-draws{draws}-seed{values.seed}"
    for metric in values.metrics:
        noise = bpd.UNIFORM if metric == "bpd" else trained_with
        likelihood = bpd.measure(
            model.flow, model.variables, dataset, mesh=mesh, noise=noise, seed=values.seed,
            draws=draws, batch_size=values.batch_size,
        )  # fmt: skip
        weights = "ema" if model.config["train"]["ema_decay"] else "params"
        result = bpd.record(likelihood, noise, dataset, step=model.step, weights=weights)
        print(f"step {model.step}: {bpd.describe(result)}")
        print(f"written to {write_result(workdir, result, suffix)}")
    return 0
