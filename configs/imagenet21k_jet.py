"""Jet pretrained on ImageNet-21k, at 64 pixels or, with `:32`, at 32: arXiv 2412.15129.

Published bits per dimension: 3.15 at 64 pixels, 3.857 at 32, each on images that the authors held
out. Ours are others, about one in 256, so figures compare roughly.

Ours: 50 epochs, patches of 2 pixels at 32, and what `imagenet64_jet` names.
With `:smoke` or `:32,smoke`, a trial of a minute or two on a CPU.
"""

from configs import base, imagenet32_jet, imagenet64_jet


def get_config(arguments=""):
    pixels, smoke = base.arguments(arguments, "64", "32")
    config = {"32": imagenet32_jet, "64": imagenet64_jet}[pixels].get_config("64x5")
    config.data.name = f"imagenet21k/{pixels}"
    config.train.epochs = 50
    config.train.eval_every = 25_000  # about every second epoch
    return base.smoke(config, f"shapes/{pixels}") if smoke else config
