"""Jet on ImageNet-32 (van den Oord's version), by the recipe that was published for 64 pixels.

We know of no published figure for this recipe (arXiv 2412.15129) at 32 pixels.

Ours: patches of 2 pixels, for as many tokens as at 64 pixels; and what `imagenet64_jet` names. With
`:smoke`, a trial of a minute or two on a CPU.
"""

from configs import base, imagenet64_jet


def get_config(arguments=""):
    size, smoke = base.arguments(arguments, "64x5", "32x2")
    config = imagenet64_jet.get_config(size)
    config.data.name = "imagenet32_old"
    config.flow.patch_size = 2
    return base.smoke(config, "shapes/32") if smoke else config
