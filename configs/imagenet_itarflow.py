"""iTARFlow on ImageNet at 64, 128 and 256 pixels, with labels, for samples: arXiv 2604.20041.

One flow for all levels of noise; three shallow blocks and a deep one, which is decoded first and
alone guided; a sample is denoised along falling levels. Published: FID 1.68 at 64 pixels. `:64`
(the default) has width 1280 and 300 epochs, `:128` 1600 and 450, `:256` 2176 and 600.

Ours: nets in bfloat16, rematerialisation, and the state split over the devices; the first learning
rate is the last one. With `:smoke`, `:128,smoke` and `:256,smoke`, a trial of minutes on a CPU.
"""

from configs import base

# pixels: data set, width, patch size, largest noise level, epochs, label drop, guidance
ROWS = {
    "64": ("imagenet64_new", 1280, 2, 0.3, 300, 0.1, 2.1),
    "128": ("imagenet1k/128", 1600, 4, 0.5, 450, 0.1, 3.7),
    "256": ("imagenet1k/256", 2176, 8, 0.7, 600, 0.0, 4.2),
}


def get_config(arguments=""):
    pixels, smoke = base.arguments(arguments, *ROWS)
    data, width, patch_size, t1, epochs, label_drop, guidance = ROWS[pixels]
    config = base.on_pod(base.tarflow())
    base.for_levels(config, t0=0.01, t1=t1, steps=round(t1 / 0.01))
    config.data.name = data
    config.data.test_split = "validation"
    config.data.labels = True
    config.flow.patch_size = patch_size
    config.flow.width = width
    config.flow.num_blocks = 4
    config.flow.layers_per_block = (4, 4, 4, 24)
    config.noise.label_drop = label_drop
    config.noise.flip = True
    config.optim.min_lr = 1e-5
    config.optim.warmup = 1 / epochs  # one epoch
    config.train.batch_size = 512
    config.train.epochs = epochs
    config.train.eval_every = 25_000  # about every tenth epoch
    config.train.checkpoint_every = 2500
    config.eval.batch_size = 512
    config.eval.guidance = guidance
    config.eval.guide_rule = "scale"
    config.eval.guide_blocks = 1
    return base.smoke(config, f"shapes/{pixels}") if smoke else config
