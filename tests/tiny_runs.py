"""Runs of a second: tiny flows on digits of 8x8 pixels, trained through the command line."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jetflow import cli, configs
from jetflow.checkpoint import Checkpoints
from jetflow.files import read_metrics
from jetflow.training.log import SPEED

ROOT = Path(__file__).parent.parent
STEPS = 12

# Four tokens of 16 features, and all that a resumed run could get wrong: averaged parameters,
# accumulation, noise, dropped labels, mirrored images, events at different intervals.
COMMON = {
    "data.name": "digits",
    "flow.patch_size": 4,
    "flow.width": 32,
    "noise.flip": True,
    "train.batch_size": 16,
    "train.steps": STEPS,
    "train.accumulation": 2,
    "train.ema_decay": 0.9,
    "train.log_every": 4,
    "train.eval_every": 6,
    "train.sample_every": 6,
    "train.checkpoint_every": 5,
    "eval.draws": 2,
    "eval.samples": 20,
}
LABELS = {"data.labels": True, "noise.label_drop": 0.2}
TARFLOW = {"flow.num_blocks": 2, "flow.layers_per_block": 1, "flow.head_dim": 16}
JET = {"flow.num_couplings": 5}
NO_LABELS = {"data.labels": False, "noise.label_drop": 0.0, "eval.guidance": 0.0}
UNIFORM = {
    "noise.kind": "uniform",
    "noise.std": 0.0,
    "flow.pixel_scale": 128.0,
    "eval.denoise": False,
}

# name -> config file, fields
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "jet": ("photos_jet.py", COMMON | JET | LABELS),
    "tarflow": ("digits_tarflow.py", COMMON | TARFLOW | LABELS),
    "volume preserving": (
        "digits_tarflow.py",
        COMMON | TARFLOW | NO_LABELS | UNIFORM | {"flow.volume_preserving": True},
    ),
}


def arguments(name: str, workdir: Path, **fields: Any) -> list[str]:
    """The command line that trains the flow `name`, with more fields as `train__steps=1`."""
    file, settings = FLOWS[name]
    settings = settings | {key.replace("__", "."): value for key, value in fields.items()}
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["train", "--config", str(ROOT / "configs" / file), *given, "--workdir", str(workdir)]


def config(name: str, **fields: Any) -> Any:
    """The config of the same run."""
    file, settings = FLOWS[name]
    config = configs.read(str(ROOT / "configs" / file))
    for field, value in {**settings, **fields}.items():
        configs.change(config, field.replace("__", "."), value)
    return config


def train(name: str, workdir: Path, **fields: Any) -> int:
    return cli.main(arguments(name, workdir, **fields))


def environment(**variables: str) -> dict[str, str]:
    """That of a process of its own."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


def start(
    arguments: list[str], program: Sequence[str] = ("-m", "jetflow"), **variables: str
) -> subprocess.Popen:
    """A process of its own that runs a command line."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def send(number: int) -> None:
    """A signal to this process, which must be able to take it."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)


@dataclasses.dataclass(frozen=True)
class Remains:
    """What a run leaves, without what may differ: speed, and the time stamps of events."""

    step: int
    state: dict[str, np.ndarray]
    metrics: list[dict[str, float]]
    evaluations: dict[str, Any]
    pictures: dict[str, bytes]


def remains(workdir: Path) -> Remains:
    step, state = read_state(workdir)
    metrics = read_metrics(workdir / "metrics.jsonl")
    for line in metrics:
        for name in SPEED:
            line.pop(name, None)
    own = re.compile(r"(noised_)?bpd-\d{8}\.json")  # other tests may have asked for more
    evaluations = {
        path.name: json.loads(path.read_text())
        for path in workdir.glob("evals/*")
        if own.fullmatch(path.name)
    }
    pictures = {path.name: path.read_bytes() for path in workdir.glob("samples/*")}
    return Remains(step, state, metrics, evaluations, pictures)


def read_state(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The step and the arrays of the newest sound checkpoint, by their paths."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        record = workdir / "checkpoints" / str(checkpoints.latest()) / "record" / "metadata"
        wanted: dict[str, Any] = {}
        for path, (kind, _) in json.loads(record.read_text())["arrays"].items():
            dtype, _, shape = kind.rstrip("]").partition("[")
            shape = tuple(map(int, filter(None, shape.split(","))))
            field, _, rest = path.partition("/")
            array = jax.ShapeDtypeStruct(shape, dtype)
            if rest:
                wanted.setdefault(field, {})[rest] = array
            else:
                wanted[field] = array
        restored, step = checkpoints.restore(wanted)
    paths, _ = jax.tree_util.tree_flatten_with_path(restored)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): a for path, a in paths}
    return step, {path: np.asarray(array) for path, array in named.items()}


def assert_metrics_near(workdir: Path, expected: Path, rel: float) -> None:
    """Those of two runs, but for their speed."""
    lines = (read_metrics(path / "metrics.jsonl") for path in (workdir, expected))
    for actual, wanted in zip(*lines, strict=True):
        for name in SPEED:
            actual.pop(name, None), wanted.pop(name, None)
        assert actual == pytest.approx(wanted, rel=rel, abs=1e-7)


def assert_same(actual: Remains, expected: Remains) -> None:
    """Equal to the last bit."""
    assert actual.step == expected.step
    assert actual.state.keys() == expected.state.keys()
    for path, array in expected.state.items():
        assert array.dtype == actual.state[path].dtype, path
        assert array.tobytes() == actual.state[path].tobytes(), path
    assert actual.metrics == expected.metrics
    assert actual.evaluations == expected.evaluations
    assert actual.pictures == expected.pictures
