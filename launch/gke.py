"""Prints the JobSet that runs jetflow on TPU slices of a GKE cluster. See launch/README.md.

python launch/gke.py --name N --topology v5e:4x4 --image I jetflow train … | kubectl apply -f -
"""

import argparse
import json
import math
import string
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

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--topology", required=True, help="GENERATION:SHAPE, as in v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="so many of that topology")
    parser.add_argument("--image", required=True, help="a container image with jetflow in it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="jetflow train --config …")
    options = parser.parse_args()
    generation, _, shape = options.topology.partition(":")
    chips = math.prod(int(side) for side in shape.split("x") if side.isdigit())
    each = SINGLE_HOSTS.get(shape, 4)
    if generation not in ACCELERATORS or chips % each or options.slices < 1:
        parser.error(
            f"no TPU slices: {options.slices} of {options.topology}; expected 1 of v5e:4x4"
        )
    if options.command[:1] != ["jetflow"]:
        parser.error("no command; expected one such as jetflow train --config …")
    fields = vars(options) | dict(
        accelerator=ACCELERATORS[generation], shape=shape, chips=each, hosts=chips // each,
        command=json.dumps(options.command),
    )  # fmt: skip
    template = string.Template(Path(__file__).with_suffix(".yaml").read_text())
    print(template.safe_substitute(fields), end="")
