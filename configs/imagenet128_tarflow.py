"""TarFlow [4-1024-8-8] on ImageNet at 128 pixels, with labels, for samples: arXiv 2412.06329.

Published: FID 5.03 after 320 epochs with gaussian noise of 0.15, guided and denoised. The nets
compute in bfloat16 and the state is split over the devices: those two are ours.
"""

from configs import base


def get_config():
    config = base.tarflow()
    config.data.name = "imagenet1k/128"
    config.data.test_split = "validation"
    config.data.labels = True
    config.flow.patch_size = 4
    config.flow.width = 1024
    config.flow.pixel_scale = 127.5
    config.flow.dtype = "bfloat16"
    config.flow.remat = "full"
    config.noise.kind = "gaussian"
    config.noise.std = 0.15
    config.noise.label_drop = 0.1
    config.noise.flip = True
    config.optim.warmup = 1 / 320  # one epoch
    config.train.batch_size = 768
    config.train.epochs = 320
    config.train.eval_every = 16_700  # about every tenth epoch
    config.train.checkpoint_every = 1670
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.eval.batch_size = 768
    config.eval.denoise = True
    return config
