"""Jet on ImageNet-64 (van den Oord's version): arXiv 2412.15129, Table 1, and its released config.

Published bits per dimension: 3.72 for `:32x2`, 32 couplings of depth 2 (the default), and 3.66 for
`:64x5`, the best of those trained from scratch.

Ours: nets in bfloat16, rematerialisation, and the state split over the devices. With `:smoke`, a
trial of a minute or two on a CPU.
"""

from configs import base


def get_config(arguments=""):
    size, smoke = base.arguments(arguments, "32x2", "64x5")
    config = base.on_pod(base.jet())
    config.data.name = "imagenet64_old"
    config.data.test_split = "validation"
    config.flow.num_couplings, config.flow.block_depth = map(int, size.split("x"))
    config.train.batch_size = 1024
    config.train.epochs = 200
    config.train.eval_every = 12_500  # about every tenth epoch
    config.train.checkpoint_every = 1250
    config.eval.batch_size = 1024
    return base.smoke(config, "shapes/64") if smoke else config
