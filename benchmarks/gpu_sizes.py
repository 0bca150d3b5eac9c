"""What benchmarks/gpu.py runs in full size, and in toy size to try the script."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Result = Iterator[dict[str, Any]]

# What every task adds to a config: no archives are needed, and what counts are the shapes.
DATA = {"data.name": "shapes/64", "data.test_split": "test"}
TOY_TARFLOW = {"data.name": "shapes/32", "flow.patch_size": 4, "flow.width": 128}
TOY_JET = {"data.name": "shapes/32"}
NO_PICTURES = {"train.eval_every": 0, "train.sample_every": 0, "eval.samples": 1, "eval.draws": 1}


class Skip(Exception):
    """A task cannot be done on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of all that is run; config fields go before those of the config files."""

    for_cpu: bool
    suffix: str  # of the config's argument
    tarflow: dict[str, Any]
    jet: dict[str, Any]
    batch: dict[str, int]  # of a training step: by kind, and of a TarFlow that recomputes nothing
    matrix: int  # rows and columns of the product that measures the peak
    steps: int  # that are timed as one round
    sampled: tuple[int, ...]  # batch sizes
    likelihoods: int  # images
    fit: dict[str, Any]
    resume: dict[str, Any]


SIZES = {
    "full": Size(
        for_cpu=False,
        suffix="",
        tarflow=DATA,
        jet=DATA,
        batch={"tarflow": 64, "jet": 256, "none": 16},
        matrix=8192,
        steps=5,
        sampled=(16, 64),
        likelihoods=32,
        fit={"data.name": "photos/64", "train.batch_size": 64, "train.steps": 400, "optim.lr": 5e-4,
             "optim.clip_norm": 1.0, "optim.warmup": 0.1},
        resume={"flow.patch_size": 4, "flow.width": 512, "flow.num_blocks": 4,
                "flow.layers_per_block": 4, "train.batch_size": 32, "train.steps": 200,
                "train.checkpoint_every": 50},
    ),
    "toy": Size(
        for_cpu=True,
        suffix=",smoke",
        tarflow=TOY_TARFLOW,
        jet=TOY_JET,
        batch={"tarflow": 4, "jet": 4, "none": 4},
        matrix=256,
        steps=1,
        sampled=(2,),
        likelihoods=4,
        fit=TOY_TARFLOW | {"train.steps": 4, "optim.clip_norm": 1.0, "optim.warmup": 0.1},
        resume=TOY_TARFLOW | {"train.steps": 60, "train.checkpoint_every": 10},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    size: Size
    scratch: Path
    seconds: float  # that a task has

    @property
    def fit(self) -> Path:
        """The workdir of the TarFlow that samples and likelihoods are of."""
        return self.scratch / "fit"

    @property
    def weights(self) -> Path:
        return self.scratch / "fit.pth"

    def file(self, kind: str) -> str:
        aim = {"tarflow": "unconditional", "jet": "32x2", "likelihood": "likelihood"}[kind]
        name = "jet" if kind == "jet" else "tarflow"
        return f"{ROOT}/configs/imagenet64_{name}.py:{aim}{self.size.suffix}"

    def config(self, kind: str, fields: dict[str, Any]) -> Any:
        """The config of "tarflow", "likelihood" (one too) or "jet", with fields changed."""
        from jetflow import configs

        config = configs.read(self.file(kind))
        sizes = self.size.jet if kind == "jet" else self.size.tarflow
        for name, value in {**sizes, **fields}.items():
            configs.change(config, name, value)
        return config

    def training(self, kind: str, fields: dict[str, Any], workdir: Path) -> list[str]:
        """The command that trains."""
        fields = {"flow.dtype": "bfloat16", "train.epochs": 0, **NO_PICTURES, **fields}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "jetflow", "train", "--config", self.file(kind)]
        return [*command, *flags, "--workdir", str(workdir)]
