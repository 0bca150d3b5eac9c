"""Jet pretrained on ImageNet-21k at 32 pixels, then trained on CIFAR-10: arXiv 2412.15129.

Published bits per dimension: 3.018. The weights to start from are those of `imagenet21k_jet.py:32`,
in `init_from`.

Ours: the length, the learning rate and the batch, and what `imagenet21k_jet` names. With `:smoke`,
a trial of a minute or two on a CPU, from scratch unless `--config.init_from` names a run of
`imagenet21k_jet.py:32,smoke`.
"""

from configs import base, imagenet32_jet


def get_config(arguments=""):
    _, smoke = base.arguments(arguments)
    config = imagenet32_jet.get_config("64x5")
    config.data.name = "cifar10"
    config.data.test_split = "test"
    config.init_from = "runs/imagenet21k_jet32"
    config.optim.lr = 1e-4
    config.train.batch_size = 256
    config.train.epochs = 100
    config.train.eval_every = 2000  # about every tenth epoch
    config.train.checkpoint_every = 1000
    config.eval.batch_size = 256
    return base.smoke(config, "shapes/32") if smoke else config
