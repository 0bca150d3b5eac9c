"""The options of a trained flow: its checkpoint, and how the devices are laid out for it."""

import dataclasses

from jax.sharding import Mesh

from jetflow import sharding
from jetflow.options import Options, option
from jetflow.types import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which flow of a run, and on which devices."""

    step: int | None = option(None, "of the checkpoint; default: the newest", least=0)
    mesh: tuple[str, ...] = option(
        ("data=-1",),
        "how the devices are laid out: sizes of data, fsdp and tensor, -1 for the rest",
    )


def read_mesh(texts: tuple[str, ...]) -> Mesh:
    """The mesh that the option asks for.

    Raises:
        UsageError: if it is malformed, or does not fit the devices.
    """
    sizes = {}
    for text in texts:
        axis, _, size = text.partition("=")
        if axis not in sharding.AXES or not size.removeprefix("-").isdecimal():
            raise UsageError(f"--mesh has {text!r}; expected AXIS=SIZE, as in --mesh data=2,fsdp=4")
        sizes[axis] = int(size)
    return sharding.make_mesh(**sizes, asked_by="--mesh")
