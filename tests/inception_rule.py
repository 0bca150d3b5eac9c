"""Weights of the FID's network made by a rule, and what the published network makes of them.

Run as a script, it writes a file for --inception_weights, where the published one cannot be
downloaded: `python tests/inception_rule.py rule.pth`. Distances by it compare with each other only.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
from published import GOLDEN

from jetflow.pth import write_pth

FOLDER = GOLDEN / "inception"


def tensors() -> dict[str, np.ndarray]:
    """As the rule in `golden/README.md` makes them, under their published names."""
    return {
        name: tensor(name, tuple(shape))
        for name, shape in json.loads((FOLDER / "shapes.json").read_text()).items()
    }


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("conv.weight"):
        values = r * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        values = 1 + 0.1 * r
    elif name.endswith("running_var"):
        values = np.exp(0.2 * r)
    elif name.endswith("fc.weight"):
        values = r / np.sqrt(2048)
    else:
        values = 0.1 * r
    return values.astype(np.float32)


def golden() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "fid.npz", allow_pickle=False) as file:
        return dict(file)


def write(path: Path) -> Path:
    """A file of these weights, such as --inception_weights takes."""
    write_pth(path, tensors())
    return path


if __name__ == "__main__":
    (out,) = sys.argv[1:]
    print(write(Path(out)))
