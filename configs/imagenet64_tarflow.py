"""TarFlow [2-768-8-8] on ImageNet-64 (Chrabaszcz's version), for likelihood: arXiv 2412.06329.

Published: 2.99 bits per dimension after 100 epochs with uniform noise, in float32. The nets compute
in bfloat16 and the state is split over the devices: those two are ours.
"""

from configs import base


def get_config():
    config = base.tarflow()
    config.data.name = "imagenet64_new"
    config.data.test_split = "validation"
    config.flow.dtype = "bfloat16"
    config.flow.remat = "full"
    config.noise.flip = True
    config.optim.warmup = 0.01  # one epoch
    config.train.batch_size = 256
    config.train.epochs = 100
    config.train.eval_every = 50_000  # about every tenth epoch
    config.train.checkpoint_every = 2500
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.eval.batch_size = 256
    return config
