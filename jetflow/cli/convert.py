"""`jetflow convert`: a published checkpoint to a workdir, and a workdir to a .pth file."""

import dataclasses
import functools
import shlex
from collections.abc import Callable

import jax

from jetflow.buckets import AnyPath
from jetflow.cli.flags import Command
from jetflow.files import check_writable
from jetflow.model import load_model
from jetflow.options import Options, option
from jetflow.tools.convert import itarflow_run, jet_run, tarflow_run, to_tarflow
from jetflow.tools.convert.models import Published
from jetflow.tools.convert.runs import ItarflowOptions, JetOptions, TarflowOptions
from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseOptions(Options):
    """The way back."""

    source: AnyPath = option(help="the workdir of a TarFlow")
    out: AnyPath = option(help="the .pth file to write", example="FILE.pth")


def _reverse(options: ReverseOptions) -> None:
    if options.out.exists():
        raise UsageError(f"{options.out} exists; give another --out")
    check_writable("out", options.out)
    model = load_model(options.source)
    try:
        to_tarflow(options.out, model.flow, model.variables)
    except OSError as error:
        raise UsageError(
            f"--out {options.out} cannot be written ({error}); give another"
        ) from error
    print(f"step {model.step} of {options.source}: {options.out}")


def _forth(
    run: Callable[..., Published], options: TarflowOptions | ItarflowOptions | JetOptions
) -> None:
    """Make a workdir, say what it is, and the commands that go on with it."""
    published, workdir = run(**vars(options)), shlex.quote(str(options.out))
    kind, num_classes = published.section["kind"], published.flow.num_classes
    count = sum(leaf.size for leaf in jax.tree.leaves(published.variables["params"]))
    print(f"{kind} with {count:,} parameters, {num_classes} classes: {options.out}")
    print(f"sample it:   jetflow sample --workdir {workdir}")
    if options.data:
        print(f"measure it:  jetflow evaluate --workdir {workdir}")
    else:
        print("measure it:  convert it again with --data NAME, which `jetflow evaluate` needs")
    settings = {f"flow.{name}": value for name, value in published.section.items()}
    if isinstance(options, ItarflowOptions):
        settings |= {"noise.kind": "levels", "noise.t0": options.t0, "noise.t1": options.t1}
    else:
        std = options.noise_std if isinstance(options, TarflowOptions) else 0.0
        settings |= {"noise.kind": "gaussian" if std else "uniform", "noise.std": std}
    settings |= {"data.labels": num_classes > 0, "init_from": options.out}
    del settings["flow.kind"]
    words = [shlex.quote(f"--config.{name}={value}") for name, value in settings.items()]
    print(f"train it on: jetflow train --config A_{kind.upper()}.py --workdir … {' '.join(words)}")


COMMANDS = {
    "--reverse tarflow": Command(
        "jetflow convert --reverse tarflow runs/tar --out FILE.pth",
        ReverseOptions,
        _reverse,
        ("source",),
    ),
    "tarflow": Command(
        "jetflow convert tarflow SOURCE.pth --out runs/tar --image_size 64 --channels 3 "
        "--patch_size 2 --noise_std 0.05",
        TarflowOptions,
        functools.partial(_forth, tarflow_run),
        ("source",),
    ),
    "itarflow": Command(
        "jetflow convert itarflow SOURCE.pth --out runs/itar --image_size 64 --channels 3 "
        "--patch_size 2 --t1 0.3",
        ItarflowOptions,
        functools.partial(_forth, itarflow_run),
        ("source",),
    ),
    "jet": Command(
        "jetflow convert jet SOURCE --out runs/jet --image_shape 64,64,3 --patch_size 4 "
        "--num_heads 8 --kinds channels,channels,channels,channels,spatial",
        JetOptions,
        functools.partial(_forth, jet_run),
        ("source",),
    ),
}
