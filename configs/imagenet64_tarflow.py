"""TarFlow [2-768-8-8] on ImageNet-64: arXiv 2412.06329, and its released code.

Published: `:likelihood` (the default), trained on uniform noise in float32, has 2.99 bits per
dimension. For samples, with gaussian noise of 0.05, `:unconditional` has FID 18.42 and
`:conditional` 2.66, guided and denoised, of 50,000 samples against the whole training set.

The paper cites van den Oord's version for what has no labels, while its code reads images by class,
as Chrabaszcz's version has them. We take Chrabaszcz's, whose likelihoods are lower: the 2.99 may be
of either. `--config.data.name=imagenet64_old` is the other. `:likelihood` multiplies in
full float32: by default TPUs and newer GPUs would round the factors.

Ours: where samples are the aim, the batch of 256 and nets in bfloat16; rematerialisation, and the
state split over the devices; the strength of guidance is to be searched, see configs/sweeps. With
`:smoke`, `:unconditional,smoke` and `:conditional,smoke`, a trial of a minute or two on a CPU.
"""

from configs import base


def get_config(arguments=""):
    aim, smoke = base.arguments(arguments, "likelihood", "unconditional", "conditional")
    config = base.on_pod(base.tarflow())
    config.data.name = "imagenet64_new"
    config.data.test_split = "validation"
    config.data.labels = aim == "conditional"
    config.noise.flip = True
    config.train.batch_size = 256
    config.train.epochs = 100
    if aim == "likelihood":
        config.flow.dtype = "float32"
        config.flow.precision = "highest"
    else:
        base.for_samples(config, noise_std=0.05)
        config.noise.label_drop = 0.1 if config.data.labels else 0.0
        config.train.epochs = 200
    config.optim.warmup = 1 / config.train.epochs  # one epoch
    config.train.eval_every = 50_000  # about every tenth epoch
    config.train.checkpoint_every = 2500
    config.eval.batch_size = 256
    return base.smoke(config, "shapes/64") if smoke else config
