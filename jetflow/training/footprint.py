"""What a training step takes of each device's memory, told by what it took on other devices."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jetflow import sharding
from jetflow.training.experiment import Run
from jetflow.types import UsageError

MEASURES = ("bytes_beside_state", "images_at_once")


def measured(run: Run, compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a step takes beside the state, in bytes, and the images that a device has at once."""
    beside = sharding.peak_bytes(compiled) - sharding.bytes_per_device(run.abstract_state)
    images = _images(run, run.config.train.accumulation)
    return dict(zip(MEASURES, (max(0, beside), images), strict=True))


def doubt(run: Run, environments: Sequence[dict[str, Any]]) -> str:
    """A line if the step, by what it took on other devices of the kind, will not fit; or nothing.

    The state counts exactly, what is beside it in proportion to the images that a device has at
    once. That is an estimate: it forbids nothing.

    Args:
        environments: of the run so far; some have what `measured` gave.
    """
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    known = [each for each in environments if {"devices", *MEASURES} <= each.keys()]
    if not known or known[-1]["devices"].partition(" x ")[2] != devices.partition(" x ")[2]:
        return ""
    last, accumulation = known[-1], run.config.train.accumulation
    limit, state = sharding.memory_of(run.mesh), sharding.bytes_per_device(run.abstract_state)

    def needed(accumulation: int) -> float:
        images = _images(run, accumulation) / max(1, last["images_at_once"])
        return state + images * last["bytes_beside_state"]

    is_known = last["devices"] == devices and last["images_at_once"] == _images(run, accumulation)
    if is_known or needed(accumulation) <= limit:
        return ""
    fitting = next((each for each in _accumulations(run) if needed(each) <= limit), None)
    return (
        f"by what it took on {last['devices']}, the training step needs about "
        f"{needed(accumulation) / 2**30:,.1f} GiB of each device's {limit / 2**30:,.1f}; "
        f"{_remedy(fitting)}"
    )


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Inside, a step that runs out of a device's memory is a UsageError of one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        limit = sharding.memory_of(run.mesh) / 2**30
        raise UsageError(
            f"the training step does not fit into the {limit:,.1f} GiB of each device; "
            f"{_remedy(next(_accumulations(run), None))}"
        ) from error


def _remedy(accumulation: int | None) -> str:
    if accumulation is None:
        return "no accumulation helps: take more devices, or split the state with config.mesh.fsdp"
    return f"the same command with --config.train.accumulation={accumulation} goes on with less"


def _images(run: Run, accumulation: int) -> int:
    return run.config.train.batch_size // accumulation // sharding.batch_parts(run.mesh)


def _accumulations(run: Run) -> Iterator[int]:
    """The greater ones that the batch and the mesh allow."""
    parts, size = sharding.batch_parts(run.mesh), run.config.train.batch_size
    for each in range(run.config.train.accumulation + 1, size // parts + 1):
        if size % (each * parts) == 0:
            yield each
