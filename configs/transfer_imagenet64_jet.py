"""Jet pretrained on ImageNet-21k, then trained on ImageNet-64 (van den Oord's): arXiv 2412.15129.

Published bits per dimension: 3.580. The weights to start from are those of `imagenet21k_jet`, in
`init_from`.

Ours: the length and the learning rate, and what `imagenet64_jet` names. With `:smoke`, a trial of a
minute or two on a CPU, from scratch unless `--config.init_from` names a run of
`imagenet21k_jet.py:smoke`.
"""

from configs import base, imagenet64_jet


def get_config(arguments=""):
    _, smoke = base.arguments(arguments)
    config = imagenet64_jet.get_config("64x5")
    config.init_from = "runs/imagenet21k_jet"
    config.optim.lr = 1e-4
    config.train.epochs = 30
    return base.smoke(config, "shapes/64") if smoke else config
