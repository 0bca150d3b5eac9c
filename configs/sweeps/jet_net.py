"""Jet in miniature: Vision Transformer against convolutional coupling nets of equal size.

On crops of two photographs, with couplings enough for the log-determinant's cap not to matter: of
eight, either net uses more than 90 % of it and ends at the same bits per dimension. The claim of
arXiv 2412.15129 to look for: couplings with attention reach fewer bits. Nets of this size show it;
of wider ones, convolutions lead after 500 steps. The README has figures, of one seed.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(axis("config.flow.net", ["vit", "conv"]), axis("config.train.seed", [0, 1, 2])),
        metrics=("bpd",),
        config="../photos_jet.py:16",
        fixed={
            "config.flow.num_couplings": 16,
            "config.flow.width": 48,
            "config.train.batch_size": 32,
            "config.train.steps": 1000,
        },
        repeats=("config.train.seed",),
    )
