"""Jet on ImageNet-64 (van den Oord's version), as published: arXiv 2412.15129, Table 1.

The default, 32 couplings of depth 2, has 3.72 bits per dimension there; `:64x5`, 64 couplings of
depth 5, the best of those trained from scratch, 3.66. The nets compute in bfloat16, and the state
is split over the devices: those two are ours.
"""

from configs import base


def get_config(size="32x2"):
    config = base.jet()
    couplings, depth = map(int, size.split("x"))
    config.data.name = "imagenet64_old"
    config.data.test_split = "validation"
    config.flow.num_couplings = couplings
    config.flow.block_depth = depth
    config.flow.dtype = "bfloat16"
    config.flow.remat = "full"
    config.train.batch_size = 1024
    config.train.epochs = 200
    config.train.eval_every = 12_500  # about every tenth epoch
    config.train.checkpoint_every = 1250
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.eval.batch_size = 1024
    return config
