"""TarFlow [8-768-8-8] on AFHQ at 256 pixels, with labels, for samples: arXiv 2412.06329.

Trained for 4,000 epochs with gaussian noise of 0.07; the paper shows samples, and no FID.

Ours: the batch of 256, nets in bfloat16, rematerialisation, and the state split over the devices;
the strength of guidance is to be searched, see configs/sweeps. With `:smoke`, a trial of a minute
or two on a CPU.
"""

from configs import base


def get_config(arguments=""):
    _, smoke = base.arguments(arguments)
    config = base.on_pod(base.for_samples(base.tarflow(), noise_std=0.07))
    config.data.name = "afhq/256"
    config.data.test_split = "validation"
    config.data.labels = True
    config.noise.label_drop = 0.1
    config.flow.patch_size = 8
    config.noise.flip = True
    config.optim.warmup = 1 / 4000  # one epoch
    config.train.batch_size = 256
    config.train.epochs = 4000
    config.train.eval_every = 5000  # about every ninetieth epoch
    config.train.checkpoint_every = 1000
    config.eval.batch_size = 256
    return base.smoke(config, "shapes/256") if smoke else config
