"""What a run computed with: versions, devices and processes, from which step on."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from jetflow.workdir import write_json

ENVIRONMENT = "environment.json"
PACKAGES = ("jetflow", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe() -> dict[str, Any]:
    """Of this process and its fellows."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def note(workdir: Path, step: int) -> None:
    """Add this environment to a run's, from `step` on, where it is not that of the steps before."""
    here, known = describe(), read(workdir)
    if known and {**known[-1], "from_step": None} == {"from_step": None, **here}:
        return
    write_json(workdir / ENVIRONMENT, [*known, {"from_step": step, **here}])


def read(workdir: Path) -> list[dict[str, Any]]:
    """The environments of a run, in the order of its steps; none in runs that noted none."""
    path = workdir / ENVIRONMENT
    return json.loads(path.read_text()) if path.exists() else []
