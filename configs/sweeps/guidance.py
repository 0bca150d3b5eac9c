"""Guidance, denoising and annealing of the conditional TarFlow on digits.

What each does to the samples of one flow, at the prior temperature of 1. The sample_accuracy is how
often the flow's own likelihoods tell the label with which a sample was drawn; the accuracy, that of
real images, is the same at all points. The distances are of few samples, so too large: they
compare with each other alone.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(
            axis("denoise", [False, True]),
            axis("annealed", [False, True]),
            axis("guidance", [0.0, 0.5, 1.0, 2.0, 4.0]),
        ),
        metrics=("fid", "sample_accuracy", "accuracy"),
        config="../digits_tarflow.py",
        fixed={"num_samples": 300},  # a point a minute on two CPU cores
    )
