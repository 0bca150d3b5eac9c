"""Jet in miniature: how many channel splits for each spatial one.

An ablation of arXiv 2412.15129, whose recipe takes 4 to 1, on crops of two photographs.
"""

from jetflow.sweeps import Sweep, axis


def get_sweep():
    kinds = {
        f"{channels}:{spatial}": ("channels",) * channels + ("spatial",) * spatial
        for channels, spatial in ((1, 0), (4, 1), (2, 1), (1, 1), (0, 1))
    }
    return Sweep(
        axis("config.flow.kinds", kinds),
        metrics=("bpd",),
        config="../photos_jet.py:16",
        fixed={"config.flow.num_couplings": 10, "config.train.steps": 500},
    )
