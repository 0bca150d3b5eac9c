"""Jet in miniature: Vision Transformer against convolutional coupling nets of equal size.

On crops of two photographs. The claim of arXiv 2412.15129 to look for: at the same number of
parameters, couplings with attention reach fewer bits per dimension than convolutional ones.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(axis("config.flow.net", ["vit", "conv"]), axis("config.train.seed", [0, 1, 2])),
        metrics=("bpd",),
        config="../photos_jet.py:16",
        fixed={"config.train.steps": 500},
        repeats=("config.train.seed",),
    )
