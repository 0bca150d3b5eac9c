"""`jetflow <command>`: the commands, their flags, and errors as one line."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from absl import flags

from jetflow import config
from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it is for, its flags, and what it does with them.

    Attributes:
        summary: one line; usage: an example.
        define: adds the command's flags.
        run: takes the parsed flags and the arguments, and returns the exit status.
        arguments: the names of the arguments that are no flags.
    """

    summary: str
    usage: str
    define: Callable[[flags.FlagValues, Sequence[str]], None]
    run: Callable[..., int]
    arguments: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Exit status 2 means bad input, with one line that says what to do."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    name, arguments = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UsageError(f"{name!r} is no command; expected one of {', '.join(COMMANDS)}")
        values = flags.FlagValues()
        command = COMMANDS[name]
        command.define(values, [name, *arguments])
        if {"-h", "--help", "--helpfull"} & set(arguments):
            print(_help(name, command, values))
            return 0
        rest = config.parse(values, [name, *arguments])
        if unexpected := rest[len(command.arguments) :]:
            raise UsageError(f"unexpected argument {unexpected[0]!r}; see `jetflow {name} --help`")
        if missing := command.arguments[len(rest) :]:
            raise UsageError(f"{missing[0]} is missing; expected {command.usage}")
        return command.run(values, *rest)
    except UsageError as error:
        print(f"jetflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training, which handles it itself
        print("jetflow: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["jetflow trains, samples and evaluates transformer normalizing flows.", "", *lines, "",
         "jetflow COMMAND --help lists the flags of a command."]
    )  # fmt: skip


def _help(name: str, command: Command, values: flags.FlagValues) -> str:
    seen = dict.fromkeys(values[flag].name for flag in values)
    lines = [f"  --{flag}: {values[flag].help}{_default(values[flag])}" for flag in sorted(seen)]
    return "\n".join([command.summary, "", f"  {command.usage}", "", *lines])


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, False) else f" (default {flag.default_as_str})"


def _required(values: flags.FlagValues, name: str, example: str) -> Any:
    if values[name].value is None:
        raise UsageError(f"--{name} is missing; expected --{name} {example}")
    return values[name].value


# --- train -------------------------------------------------------------------------------------


def _define_train(values: flags.FlagValues, argv: Sequence[str]) -> None:
    config.define(values, argv)
    _workdir_flag(values)
    _data_dir_flag(values)


def _train(values: flags.FlagValues) -> int:
    from jetflow import loop, run

    experiment = _required(values, "config", "configs/NAME.py")
    workdir = Path(_required(values, "workdir", "runs/NAME"))
    return loop.train(run.set_up(experiment, values.data_dir), workdir)


# --- sample ------------------------------------------------------------------------------------


def _define_sample(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _workdir_flag(values)
    _step_flag(values)
    flag = _definer(values)
    flag(flags.DEFINE_string, "out", "grid.png", "the picture to write")
    flag(flags.DEFINE_string, "npz", None, "also write the images, uint8 [N, H, W, C], and labels")
    flag(flags.DEFINE_integer, "num", 64, "number of images", lower_bound=1)
    flag(flags.DEFINE_integer, "label", None, "class of all images; default: one row a class")
    flag(flags.DEFINE_integer, "seed", 0, "image i depends on the seed and i alone", lower_bound=0)
    flag(flags.DEFINE_float, "temperature", 1.0, "of the prior: multiplies its standard deviation",
         lower_bound=0.0)  # fmt: skip
    flag(flags.DEFINE_float, "guidance", 0.0, "strength of guidance", lower_bound=0.0)
    flag(flags.DEFINE_string, "guide_what", "ab", "guide a (log-scale), b (shift), or ab (both)")
    flag(flags.DEFINE_float, "attention_temperature", 1.0,
         "of guidance's unconditional pass; must differ from 1 without labels")  # fmt: skip
    flag(flags.DEFINE_bool, "annealed", False, "let guidance grow from the first token to the last")
    flag(flags.DEFINE_bool, "denoise", False, "one denoising step, for gaussian training noise")
    flag(flags.DEFINE_integer, "batch_size", 64, "images made at a time", lower_bound=1)


def _sample(values: flags.FlagValues) -> int:
    import numpy as np

    from jetflow.evals.samples import rows_by_class, square_rows
    from jetflow.noise import Purpose, key_for
    from jetflow.report import make_grid, save_png
    from jetflow.sampling.ancestral import quantise, sample_pixels
    from jetflow.types import Guidance
    from jetflow.workdir import load_model

    model = load_model(Path(_required(values, "workdir", "runs/NAME")), values.step)
    noise = model.config["noise"]
    if values.denoise and noise["kind"] != "gaussian":
        raise UsageError("--denoise needs a flow trained with gaussian noise; leave it out")
    for flag in ("out", "npz"):
        _check_writable(flag, values[flag].value)
    labels, rows = rows_by_class(values.num, model.flow.num_classes)
    if values.label is not None:
        labels, rows = values.label, square_rows(values.num)
    pixels = sample_pixels(
        model.flow,
        model.variables,
        key_for(values.seed, 0, Purpose.SAMPLE),
        num=values.num,
        label=labels,
        guidance=Guidance(
            values.guidance, values.guide_what, values.attention_temperature, values.annealed
        ),
        temperature=values.temperature,
        denoise=noise["std"] if values.denoise else 0.0,
        batch_size=values.batch_size,
    )
    broken = int((~np.isfinite(pixels)).any(axis=(1, 2, 3)).sum())
    if broken:
        print(f"jetflow: {broken} of {values.num} images are not finite", file=sys.stderr)
    images = quantise(pixels, noise["kind"])
    save_png(Path(values.out), make_grid(images, rows))
    print(f"{values.num} samples of step {model.step}: {values.out}")
    if values.npz:
        named: dict[str, Any] = {"images": images}
        if labels is not None:
            named["labels"] = np.broadcast_to(labels, (values.num,))
        Path(values.npz).parent.mkdir(parents=True, exist_ok=True)
        with open(values.npz, "wb") as file:  # of a path, savez would add to the name
            np.savez_compressed(file, **named)
        print(f"the same as arrays: {values.npz}")
    return 0


def _check_writable(flag: str, path: str | None) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--{flag} {path} cannot be written; give the path of a new file")


# --- evaluate ----------------------------------------------------------------------------------

METRICS = ("bpd", "noised_bpd")


def _define_evaluate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _workdir_flag(values)
    _step_flag(values)
    _data_dir_flag(values)
    flag = _definer(values)
    flag(flags.DEFINE_list, "metrics", ["bpd"],
         f"some of {','.join(METRICS)}: likelihood of dequantised images, or of images with "
         "the gaussian noise of training")  # fmt: skip
    flag(flags.DEFINE_string, "split", None, "default: the test split of the run's config")
    flag(flags.DEFINE_integer, "draws", None, "noise draws for each example; default: the run's",
         lower_bound=1)  # fmt: skip
    flag(flags.DEFINE_integer, "seed", 0, "of the draws", lower_bound=0)
    flag(flags.DEFINE_integer, "batch_size", 128, "images at a time; no effect but rounding errors",
         lower_bound=1)  # fmt: skip


def _evaluate(values: flags.FlagValues) -> int:
    from jetflow import sharding
    from jetflow.data import pipeline
    from jetflow.evals import bpd
    from jetflow.noise import Noise
    from jetflow.workdir import load_model, write_result

    workdir = Path(_required(values, "workdir", "runs/NAME"))
    unknown = [metric for metric in values.metrics or [""] if metric not in METRICS]
    if unknown:
        raise UsageError(f"--metrics has {unknown[0]!r}; expected some of {', '.join(METRICS)}")
    model = load_model(workdir, values.step)
    trained_with = Noise(**model.config["noise"])
    if "noised_bpd" in values.metrics and trained_with.kind == "uniform":
        raise UsageError("noised_bpd is for flows trained with gaussian noise; use --metrics bpd")
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    sharding.check_batch("--batch_size", values.batch_size, mesh)
    data = model.config["data"]
    split = values.split or data["test_split"]
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


# --- convert -----------------------------------------------------------------------------------


def _define_convert(values: flags.FlagValues, argv: Sequence[str]) -> None:
    from jetflow.convert import command

    command.define(values, argv)


def _convert(values: flags.FlagValues, model: str, source: str) -> int:
    from jetflow.convert import command

    return command.run(values, model, source)


# --- flags that commands share -----------------------------------------------------------------


def _definer(values: flags.FlagValues) -> Callable[..., None]:
    def define(kind: Callable, name: str, default: Any, text: str, **options) -> None:
        kind(name, default, text, flag_values=values, **options)

    return define


def _workdir_flag(values: flags.FlagValues) -> None:
    _definer(values)(flags.DEFINE_string, "workdir", None, "the folder of the run")


def _data_dir_flag(values: flags.FlagValues) -> None:
    text = "prepared data sets; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    _definer(values)(flags.DEFINE_string, "data_dir", None, text)


def _step_flag(values: flags.FlagValues) -> None:
    _definer(values)(flags.DEFINE_integer, "step", None, "of the checkpoint; default: the newest")


COMMANDS = {
    "train": Command(
        "Train a flow, or go on training it: the same command resumes.",
        "jetflow train --config configs/digits_tarflow.py --workdir runs/digits"
        " --config.train.steps=1000",
        _define_train,
        _train,
    ),
    "sample": Command(
        "Draw samples from a trained flow.",
        "jetflow sample --workdir runs/digits --num 64 --guidance 1 --denoise --out grid.png",
        _define_sample,
        _sample,
    ),
    "evaluate": Command(
        "Measure a trained flow; writes JSON into the run's evals folder.",
        "jetflow evaluate --workdir runs/digits --metrics bpd",
        _define_evaluate,
        _evaluate,
    ),
    "convert": Command(
        "Make a workdir of a published checkpoint, or with --reverse a .pth of a workdir.",
        "jetflow convert tarflow SRC.pth --out runs/published --image_size 64 --channels 3"
        " --patch_size 2",
        _define_convert,
        _convert,
        ("MODEL", "SRC"),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
