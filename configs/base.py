"""Every field of a config, with its default; experiments are deltas from `jet` or `tarflow`."""

from ml_collections import ConfigDict


def jet() -> ConfigDict:
    """Jet (arXiv 2412.15129), with what its published recipes have in common."""
    config = _common()
    config.flow = ConfigDict(
        dict(
            kind="jet",
            patch_size=4,  # pixels; must divide the image's height and width
            width=512,  # of the coupling nets' tokens
            num_heads=8,  # attention heads; must divide width
            num_couplings=32,  # coupling layers
            block_depth=2,  # transformer layers in each coupling's net
            kinds=("channels",) * 4 + ("spatial",),  # cycle of the couplings' splits
            net="vit",  # of the couplings: vit, or conv, convolutions of as many parameters
            scale_factor=2.0,  # a coupling scales a dimension by less than this
            noise_conditional=False,  # one flow for all levels of noise, with noise.kind levels
            dtype="float32",  # of the nets' matmuls, or bfloat16; the rest stays float32
            precision="default",  # of float32 matmuls on TPUs and GPUs: default, high, highest
            attention="auto",  # xla (written out), splash (TPU), cudnn (GPU), or what suits
            remat="none",  # recomputed backwards: none, dots (not matmuls), full (layers), block
            scan=True,  # loop over layers, or False: a program of all of them, slow to compile
        )
    )
    config.optim.mu_dtype = "bfloat16"
    config.optim.clip_norm = 1.0
    config.optim.weight_decay = 1e-5
    config.optim.decay_rule = "schedule"
    return _with_defaults(config)


def tarflow() -> ConfigDict:
    """TarFlow (arXiv 2412.06329), with what its published recipes have in common."""
    config = _common()
    config.flow = ConfigDict(
        dict(
            kind="tarflow",
            patch_size=2,  # pixels; must divide the image's height and width; of arrays 1
            width=768,  # of the transformers' tokens
            num_blocks=8,  # autoregressive blocks, in alternating direction
            layers_per_block=(8,),  # transformer layers of every block, or one number a block
            head_dim=64,  # features of an attention head; must divide width
            volume_preserving=False,  # predict shifts only, and learn the prior's variance
            noise_conditional=False,  # one flow for all levels of noise, with noise.kind levels
            pixel_scale=128.0,  # pixels v become v / pixel_scale - 1; 127.5 with gaussian noise
            dtype="float32",  # of the nets' matmuls, or bfloat16; the rest stays float32
            precision="default",  # of float32 matmuls on TPUs and GPUs: default, high, highest
            attention="auto",  # xla (written out), splash (TPU), cudnn (GPU), or what suits
            remat="none",  # recomputed backwards: none, dots (not matmuls), full (layers), block
            scan=True,  # loop over layers, or False: a program of all of them, slow to compile
        )
    )
    config.optim.lr = 1e-4
    config.optim.min_lr = 1e-6
    config.optim.weight_decay = 1e-4
    return _with_defaults(config)


def on_pod(config: ConfigDict) -> ConfigDict:
    """Nets in bfloat16, activations computed again, and the state split over all devices."""
    config.flow.dtype = "bfloat16"
    config.flow.remat = "full"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def for_samples(config: ConfigDict, noise_std: float) -> ConfigDict:
    """TarFlow's recipe for pictures: gaussian noise in training, a denoising step in sampling."""
    config.flow.pixel_scale = 127.5
    config.noise.kind = "gaussian"
    config.noise.std = noise_std
    config.eval.denoise = True
    return config


def for_arrays(config: ConfigDict, noise_std: float) -> ConfigDict:
    """For arrays that are not images: no patches; noise in standard deviations of a feature."""
    config.flow.patch_size = 1
    config.noise.kind = "gaussian"
    config.noise.std = noise_std
    config.eval.denoise = True
    return config


def for_levels(config: ConfigDict, t0: float, t1: float, steps: int) -> ConfigDict:
    """iTARFlow's recipe (arXiv 2604.20041): all levels of noise in training, many to denoise."""
    config.flow.pixel_scale = 127.5
    config.flow.noise_conditional = True
    config.noise.kind = "levels"
    config.noise.std = 0.0
    config.noise.t0 = t0
    config.noise.t1 = t1
    config.eval.denoise = True
    config.eval.denoise_steps = steps
    return config


def smoke(config: ConfigDict, data: str) -> ConfigDict:
    """The same kind of run in a minute or two on a CPU: a small flow on generated images `data`."""
    config.data.name = data
    config.data.test_split = "test"
    config.init_from = ""
    config.flow.width = 64
    if config.flow.kind == "jet":
        config.flow.num_heads = 2
        config.flow.num_couplings = 5  # one of each split
        config.flow.block_depth = 1
    else:
        config.flow.num_blocks = 2
        config.flow.layers_per_block = (1,)
    config.train.batch_size = 8
    config.train.epochs = 0
    config.train.steps = 8
    config.train.log_every = 2
    config.train.eval_every = 0
    config.train.checkpoint_every = 4
    config.eval.batch_size = 8
    config.eval.draws = 1
    config.eval.samples = 8
    config.eval.denoise_steps = min(config.eval.denoise_steps, 4)
    return config


def arguments(text: str, *choices: str) -> tuple[str, bool]:
    """What follows the colon of a config: one of `choices`, the first by default, and "smoke".

    Returns:
        The choice, and whether it is to be a `smoke` run.

    Raises:
        ValueError: on anything else.
    """
    given = [word for word in text.split(",") if word]
    chosen = [word for word in given if word != "smoke"]
    if len(chosen) > 1 or not set(chosen) <= set(choices):
        known = ", ".join([*choices, "smoke"])
        raise ValueError(f"the argument is {text!r}; expected one of {known}, or CHOICE,smoke")
    return (*chosen, *choices, "")[0], "smoke" in given


def _with_defaults(config: ConfigDict) -> ConfigDict:
    """The config, locked, with a copy of itself: a run records which defaults it changes."""
    config.defaults = config.copy_and_resolve_references()
    return config.lock()


def _common() -> ConfigDict:
    return ConfigDict(
        dict(
            init_from="",  # a workdir, also a converted one, whose weights to start from
            init_weights="auto",  # of it: "params", "ema", or averaged ones where it has them
            data=dict(
                name="digits",  # a data set that `jetflow train` can prepare, see the README
                train_split="train",  # of the data set; TFDS slices such as train[:90%] work
                test_split="test",  # held out: evaluated, never trained on
                labels=False,  # train a conditional flow on the data set's labels
                workers=0,  # processes that read training batches; 0 for threads of this one
            ),
            noise=dict(
                kind="uniform",  # dequantisation by U[0, 1); gaussian; levels; or none, of arrays
                std=0.0,  # of gaussian noise, in units where pixels span [-1, 1]
                t0=0.0,  # least and
                t1=0.0,  # largest std that levels draw for an image
                distribution="uniform",  # of them; or square: of t², or lognormal
                weight="t",  # of an image in the loss, by its level: t, t2 (t²), 1
                label_drop=0.0,  # share of labels hidden in training, for guidance
                flip=False,  # mirror images at random
            ),
            optim=dict(
                lr=3e-4,  # peak learning rate
                min_lr=0.0,  # at the start of the warm-up and at the end
                warmup=0.1,  # share of the training in which the rate rises; then a cosine
                b1=0.9,  # of Adam
                b2=0.95,
                eps=1e-8,
                weight_decay=0.0,  # decoupled, on every parameter
                decay_rule="lr",  # decay times the learning rate (AdamW), or times its "schedule"
                clip_norm=0.0,  # largest norm of the gradient; 0 for no limit
                mu_dtype="float32",  # of Adam's first moment
                multipliers=(),  # (regex, factor) on the rate of matching parameters; 0 freezes
            ),
            train=dict(
                seed=0,  # of initialisation, data order and noise
                batch_size=64,  # images per step, over all devices
                steps=0,  # length of the training: set exactly one of steps,
                epochs=0,  # passes over the training split,
                images=0,  # and images
                accumulation=1,  # parts of a batch that are computed one after another
                ema_decay=0.0,  # of averaged parameters, which evaluation uses; 0 for none
                log_every=50,  # steps between lines of metrics
                eval_every=0,  # steps between evaluations of held-out bpd; 0 for the end only
                sample_every=0,  # steps between pictures of samples; 0 for the end only
                checkpoint_every=500,  # steps between checkpoints; one more at the end
                keep_checkpoints=2,  # newest ones kept,
                keep_every=0,  # and for good those at multiples of so many steps; 0 for none
            ),
            mesh=dict(
                data=-1,  # devices over which the batch alone is split; -1 for all the rest
                fsdp=1,  # devices over which the state is split as well
                tensor=1,  # devices over which each layer is split, with its part of the state
                rules=(),  # (regex, strategy) of arrays that lie otherwise, see jetflow/sharding.py
            ),
            eval=dict(
                batch_size=128,  # images per step of an evaluation, over all devices
                draws=4,  # of the noise, in the evaluation at the end
                samples=64,  # images in a picture of samples
                temperature=1.0,  # of those samples: multiplies the prior's standard deviation
                guidance=0.0,  # strength; 0 for none
                guide_what="ab",  # guided predictions: a log-scale, b shift, ab both
                guide_rule="log_scale",  # what is guided: log_scale, scale, or by rule starflow
                guide_blocks=0,  # guided, of those decoded first; 0 for all
                attention_temperature=1.0,  # of the unguided pass; flows without labels need != 1
                annealed=False,  # guidance that grows from the first token to the last
                denoise=False,  # denoise after sampling, for gaussian noise and levels,
                denoise_steps=1,  # in so many steps, for levels
                denoise_clip=False,  # clip what a step takes for the clean image
                denoise_eta=0.0,  # share of new noise in each step but the last
            ),
        )
    )
