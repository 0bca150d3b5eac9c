"""`jetflow evaluate`: what a trained flow is worth, as JSON in its workdir."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh

from jetflow import sharding
from jetflow.cli import commands
from jetflow.cli.commands.evaluate import agreement, likelihoods, quality
from jetflow.cli.commands.evaluate.evaluation import Evaluation
from jetflow.cli.commands.evaluate.quality import Quality
from jetflow.model import Model, load_model
from jetflow.noise import LARGEST_SEED
from jetflow.types import UsageError
from jetflow.workdir import write_result

USAGE = "jetflow evaluate --workdir runs/digits --metrics bpd"
ARGUMENTS = ()

LIKELIHOODS = {
    "bpd": likelihoods.dequantised,
    "noised_bpd": likelihoods.noised,
    "bpd_gap": likelihoods.dequantised_gap,
    "noised_bpd_gap": likelihoods.noised_gap,
    "accuracy": likelihoods.accuracy,
}
AGREEMENTS = {"sample_accuracy": agreement.sample_accuracy}
QUALITIES = {
    "fid": quality.fid,
    "sfid": quality.sfid,
    "kid": quality.kid,
    "precision_recall": quality.precision_recall,
    "density_coverage": quality.density_coverage,
}
BY_MOMENTS = {"fid", "sfid"}  # the others need features of single images
METRICS = (*LIKELIHOODS, *AGREEMENTS, *QUALITIES)


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    commands.define_workdir(values)
    commands.define_step(values)
    commands.define_data_dir(values)
    commands.define_mesh(values)
    flag = commands.definer(values)
    flag(flags.DEFINE_list, "metrics", None, f"some of {', '.join(METRICS)}; default: bpd. With "
         "noised_, the likelihood of images with the gaussian noise of training; with _gap, what "
         "held-out images take more than those of the training; accuracy and sample_accuracy: of "
         "the flow's likelihoods in telling the labels of images, and of samples")  # fmt: skip
    flag(flags.DEFINE_string, "split", None, "of likelihoods and accuracy; default: the test split "
         "of the run's config")  # fmt: skip
    flag(flags.DEFINE_integer, "draws", None, "noise draws for each example; default: the run's",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_integer, "seed", 0, "of the draws, and of samples",
         lower_bound=0, upper_bound=LARGEST_SEED)  # fmt: skip
    flag(flags.DEFINE_integer, "batch_size", 128, "images at a time; no effect but rounding errors",
         lower_bound=1)  # fmt: skip
    quality.define(values)


def run(values: flags.FlagValues) -> int:
    workdir = Path(commands.required(values, "workdir", "runs/NAME"))
    check(values)
    mesh = commands.mesh(values)
    measure(values, load_model(workdir, values.step, mesh), mesh)
    return 0


def check(values: flags.FlagValues) -> None:
    """Raise a UsageError on flags that cannot work, whatever the model."""
    _metrics(values)
    sharding.check_batch("--batch_size", values.batch_size, commands.mesh(values))


def measure(values: flags.FlagValues, model: Model, mesh: Mesh) -> list[dict[str, Any]]:
    """What the flags ask for of a model: measured, written, said and returned."""
    metrics, results = _metrics(values), []
    evaluation = Evaluation(values, model, mesh)
    compared = Quality(evaluation, needs_images=bool(set(metrics) & set(QUALITIES) - BY_MOMENTS))
    if values.make_reference:
        print(f"reference written to {compared.make_reference()}")
    compared.check(metrics)
    for metric in metrics:
        if metric in QUALITIES:
            outcomes = QUALITIES[metric](compared)
        else:
            outcomes = (LIKELIHOODS | AGREEMENTS)[metric](evaluation)
        for result, text, suffix in outcomes:
            print(f"step {model.step}: {text}")
            print(f"written to {write_result(model.workdir, result, suffix)}")
            results.append(result)
    return results


def _metrics(values: flags.FlagValues) -> list[str]:
    """Raises a UsageError on one that there is not."""
    if values.metrics is None:
        return [] if values.make_reference else ["bpd"]
    unknown = [metric for metric in values.metrics or [""] if metric not in METRICS]
    if unknown:
        raise UsageError(f"--metrics has {unknown[0]!r}; expected some of {', '.join(METRICS)}")
    return values.metrics
