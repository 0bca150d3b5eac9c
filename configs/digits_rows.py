"""TarFlow on arrays that are not images: the rows of the digits as sequences of 8 tokens.

Nothing in it knows of pixels: each of the 8 features of a token is standardised, and the likelihood
is a density in the units of the data. With labels; about two minutes on two cores.
"""

from configs import base, digits_tarflow


def get_config():
    config = base.for_arrays(digits_tarflow.get_config(), noise_std=0.1)
    config.data.name = "digits_rows"
    config.optim.lr = 1e-3
    config.optim.clip_norm = 1.0
    config.train.steps = 1000
    return config
