"""TarFlow [4-1024-8-8] on ImageNet at 128 pixels, with labels, for samples: arXiv 2412.06329.

Published: FID 5.03 after 320 epochs with gaussian noise of 0.15, guided and denoised, of 50,000
samples against the whole training set.

Ours: nets in bfloat16, rematerialisation, and the state split over the devices; the strength of
guidance is to be searched, see configs/sweeps. With `:smoke`, a trial of a minute or two on a CPU.
"""

from configs import base


def get_config(arguments=""):
    _, smoke = base.arguments(arguments)
    config = base.on_pod(base.for_samples(base.tarflow(), noise_std=0.15))
    config.data.name = "imagenet1k/128"
    config.data.test_split = "validation"
    config.data.labels = True
    config.noise.label_drop = 0.1
    config.flow.patch_size = 4
    config.flow.width = 1024
    config.noise.flip = True
    config.optim.warmup = 1 / 320  # one epoch
    config.train.batch_size = 768
    config.train.epochs = 320
    config.train.eval_every = 16_700  # about every tenth epoch
    config.train.checkpoint_every = 1670
    config.eval.batch_size = 768
    return base.smoke(config, "shapes/128") if smoke else config
