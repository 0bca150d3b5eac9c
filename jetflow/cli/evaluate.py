"""`jetflow evaluate`: what a trained flow is worth, as JSON in its workdir."""

import dataclasses

from jetflow.buckets import AnyPath
from jetflow.cli.flags import Command
from jetflow.evals.evaluation import results
from jetflow.evals.quality import Quality
from jetflow.evals.records import describe
from jetflow.evals.settings import EvaluateOptions
from jetflow.hosts import ProcessOptions
from jetflow.mesh import ModelOptions, read_mesh
from jetflow.model import load_model
from jetflow.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions(EvaluateOptions, ModelOptions, ProcessOptions):
    """The options of an evaluation, and the flow."""

    workdir: AnyPath = option(help="the folder of the run", example="runs/NAME")


def run(options: CommandOptions) -> None:
    """Evaluate, and print each result as soon as it is measured."""
    model = load_model(options.workdir, options.step, read_mesh(options.mesh))
    if options.make_reference:
        print(f"reference written to {Quality(model, options).make_reference()}")
    for result, path in results(model, options):
        print(f"step {model.step}: {describe(result)}")
        print(f"written to {path}" if path else "nothing was kept: the workdir cannot be written")


COMMAND = Command("jetflow evaluate --workdir runs/digits --metrics bpd", CommandOptions, run)
