"""TarFlow on arrays that are not images: the rows of the digits as sequences of 8 tokens.

Nothing in it knows of pixels: each of the 8 features of a token is standardised, and the likelihood
is a density in the units of the data. With labels; about two minutes on two cores.
"""

from configs import base


def get_config():
    config = base.for_arrays(base.tarflow(), noise_std=0.1)
    config.data.name = "digits_rows"
    config.data.labels = True
    config.flow.width = 128
    config.flow.num_blocks = 4
    config.flow.layers_per_block = (2,)
    config.flow.scan = False
    config.noise.label_drop = 0.1
    config.optim.lr = 1e-3
    config.optim.clip_norm = 1.0
    config.train.batch_size = 32
    config.train.steps = 1000
    config.train.ema_decay = 0.99
    config.train.log_every = 100
    config.eval.samples = 80
    config.eval.temperature = 0.7
    config.eval.guidance = 2.0
    return config
