"""Prints the JobSet that runs jetflow on TPU slices of a GKE cluster. See launch/README.md.

python launch/gke.py NAME v5e:4x4 SLICES IMAGE jetflow train --config … | kubectl apply -f -
"""

import json
import math
import string
import sys
from pathlib import Path

# The node label cloud.google.com/gke-tpu-accelerator.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
SINGLE_HOSTS = {"1x1": 1, "2x4": 8}  # chips of slices with one host other than four


def main(*words: str) -> None:
    if len(words) < 5 or words[4] != "jetflow":
        raise ValueError(f"{' '.join(words)!r:.200} is no job")
    name, topology, slices, image, *command = words
    generation, _, shape = topology.partition(":")
    chips = math.prod(int(side) for side in shape.split("x") if side.isdigit())
    each = SINGLE_HOSTS.get(shape, 4)
    if generation not in ACCELERATORS or chips % each or not slices.strip("0").isdecimal():
        raise ValueError(f"there are no {slices} TPU slices {topology}")
    text = Path(__file__).with_suffix(".yaml").read_text()
    fields = dict(
        name=name, slices=slices, image=image, command=json.dumps(command), shape=shape,
        accelerator=ACCELERATORS[generation], chips=each, hosts=chips // each,
    )  # fmt: skip
    print(string.Template(text).substitute(fields), end="")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        print(f"gke.py: {error}; expected NAME v5e:4x4 1 IMAGE jetflow train …", file=sys.stderr)
        sys.exit(2)
