"""The noise-conditional flow on scikit-learn's handwritten digits, beside digits_tarflow.

One flow for all levels of noise from 0.05 to 0.3, and samples that are denoised in six steps.
"""

from configs import digits_tarflow


def get_config():
    config = digits_tarflow.get_config()
    config.flow.noise_conditional = True
    config.noise.kind = "levels"
    config.noise.std = 0.0
    config.noise.t0 = 0.05
    config.noise.t1 = 0.3
    config.eval.denoise_steps = 6
    return config
