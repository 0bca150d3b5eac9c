"""Jet in miniature: the depth of the nets against the number of couplings, at 16 layers in all.

An ablation of arXiv 2412.15129 on crops of two photographs, at about equal cost of all points.
"""

from jetflow.sweeps import Sweep, axis, together


def get_sweep():
    return Sweep(
        together(
            axis("config.flow.num_couplings", [16, 8, 4, 2]),
            axis("config.flow.block_depth", [1, 2, 4, 8]),
        ),
        metrics=("bpd",),
        config="../photos_jet.py:16",
        fixed={"config.train.steps": 500},
    )
