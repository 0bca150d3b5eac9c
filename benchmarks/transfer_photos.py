"""Held-out bits per dimension of finetuned runs and of runs from scratch, as a picture and a table.

    python benchmarks/transfer_photos.py --out docs/transfer.png \\
        --finetuned runs/finetuned{0,1,2} --scratch runs/scratch{0,1,2}
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from jetflow.files import METRICS, read_metrics

METRIC = "test_bpd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--finetuned", nargs="+", type=Path, required=True, help="workdirs")
    parser.add_argument("--scratch", nargs="+", type=Path, required=True, help="workdirs")
    parser.add_argument("--out", required=True, help="the picture")
    arguments = parser.parse_args()

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    groups = {"from scratch": arguments.scratch, "finetuned": arguments.finetuned}
    for color, (name, workdirs) in zip(("tab:gray", "tab:blue"), groups.items(), strict=True):
        curves = [held_out(workdir) for workdir in workdirs]
        for number, curve in enumerate(curves):
            axes.plot(*zip(*curve, strict=True), color=color, label=None if number else name)
        print(f"{name}: {', '.join(f'{curve[-1][1]:.3f}' for curve in curves)}")
    axes.set(xlabel="step", ylabel="held-out bits per dimension")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out, dpi=150)


def held_out(workdir: Path) -> list[tuple[int, float]]:
    """(step, bits per dimension) of each evaluation of a run."""
    lines = read_metrics(workdir / METRICS)
    return [(line["step"], line[METRIC]) for line in lines if METRIC in line]


if __name__ == "__main__":
    main()
