"""`jetflow convert`: a published checkpoint to a workdir, and a workdir to a .pth file."""

import dataclasses
import shlex
from typing import Any

import jax

from jetflow.cli.flags import Command
from jetflow.files import check_writable
from jetflow.model import load_model
from jetflow.options import option
from jetflow.tools.convert import jet_run, tarflow_run, to_tarflow
from jetflow.tools.convert.models import Published
from jetflow.tools.convert.runs import JetOptions, RunOptions, TarflowOptions
from jetflow.types import UsageError

# What must be given, but not with --reverse.
NEEDED = ("image_size", "channels", "patch_size", "noise_std")


def _optional(name: str) -> Any:
    """The same option of `TarflowOptions`, open."""
    metadata = TarflowOptions.__dataclass_fields__[name].metadata
    return dataclasses.field(default=None, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarflowCommand(TarflowOptions):
    reverse: bool = option(False, "write the TarFlow of the workdir SOURCE as a .pth")
    image_size: int | None = _optional("image_size")
    channels: int | None = _optional("channels")
    patch_size: int | None = _optional("patch_size")
    noise_std: float | None = _optional("noise_std")


def _tarflow(options: TarflowCommand) -> None:
    if options.reverse:
        return _reverse(options)
    for name in NEEDED:
        if getattr(options, name) is None:
            example = TarflowOptions.__dataclass_fields__[name].metadata["example"]
            raise UsageError(f"--{name} is missing; expected --{name} {example}, say")
    fields = vars(options) | {"reverse": None}
    del fields["reverse"]
    _report("tarflow", options, tarflow_run(**fields), options.noise_std or 0.0)


def _jet(options: JetOptions) -> None:
    _report("jet", options, jet_run(**vars(options)), 0.0)


def _reverse(options: TarflowCommand) -> None:
    for name in options.changed():
        if name not in ("source", "out", "reverse"):
            raise UsageError(f"--{name} has no effect with --reverse; leave it out")
    if options.out.exists():
        raise UsageError(f"{options.out} exists; give another --out")
    check_writable("out", options.out)
    model = load_model(options.source)
    to_tarflow(options.out, model.flow, model.variables)
    print(f"step {model.step} of {options.source}: {options.out}")


def _report(kind: str, options: RunOptions, published: Published, noise_std: float) -> None:
    """Say what was made, and the commands that go on with it."""
    workdir = shlex.quote(str(options.out))
    count = sum(leaf.size for leaf in jax.tree.leaves(published.variables["params"]))
    print(f"{kind} with {count:,} parameters, {published.num_classes} classes: {options.out}")
    print(f"sample it:   jetflow sample --workdir {workdir}")
    if options.data:
        print(f"measure it:  jetflow evaluate --workdir {workdir}")
    else:
        print("measure it:  convert it again with --data NAME, which `jetflow evaluate` needs")
    settings = {f"flow.{name}": value for name, value in published.section.items()}
    settings |= {"noise.kind": "gaussian" if noise_std else "uniform", "noise.std": noise_std}
    settings |= {"data.labels": published.num_classes > 0, "init_from": options.out}
    del settings["flow.kind"]
    words = [shlex.quote(f"--config.{name}={value}") for name, value in settings.items()]
    print(f"train it on: jetflow train --config A_{kind.upper()}.py --workdir … {' '.join(words)}")


COMMANDS = {
    "tarflow": Command(
        "jetflow convert tarflow SOURCE.pth --out runs/tar --image_size 64 --channels 3 "
        "--patch_size 2 --noise_std 0.05",
        TarflowCommand,
        _tarflow,
        ("source",),
    ),
    "jet": Command(
        "jetflow convert jet SOURCE --out runs/jet --image_shape 64,64,3 --patch_size 4 "
        "--num_heads 8 --kinds channels,channels,channels,channels,spatial",
        JetOptions,
        _jet,
        ("source",),
    ),
}
