"""TarFlow on scikit-learn's handwritten digits, with labels: the first experiment.

Gaussian noise, guidance and denoising make for samples that one can read.
"""

from configs import base


def get_config():
    config = base.for_samples(base.tarflow(), noise_std=0.1)
    config.data.name = "digits"
    config.data.labels = True
    config.flow.width = 128
    config.flow.num_blocks = 4
    config.flow.layers_per_block = (2,)
    config.flow.scan = False
    config.noise.label_drop = 0.1
    config.optim.lr = 3e-3
    config.train.batch_size = 32
    config.train.steps = 1500
    config.train.ema_decay = 0.99
    config.train.log_every = 100
    config.train.eval_every = 500
    config.train.sample_every = 500
    config.eval.samples = 80
    config.eval.temperature = 0.7
    config.eval.guidance = 2.0
    return config
