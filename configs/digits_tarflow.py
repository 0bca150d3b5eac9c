"""TarFlow on scikit-learn's handwritten digits: the first experiment."""

from configs import base


def get_config():
    config = base.tarflow()
    config.data.name = "digits"
    config.data.labels = True
    config.flow.width = 128
    config.flow.num_blocks = 4
    config.flow.layers_per_block = (2,)
    config.flow.pixel_scale = 127.5
    config.noise.kind = "gaussian"
    config.noise.std = 0.1
    config.noise.label_drop = 0.1
    config.optim.lr = 1e-3
    config.train.batch_size = 128
    config.train.steps = 500
    config.eval.guidance = 1.0
    config.eval.denoise = True
    return config
