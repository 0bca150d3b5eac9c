"""Jet pretrained on crops of one photograph, finetuned on 256 crops of the other: docs/transfer.md.

`:pretrain` takes all crops of china.jpg. `:finetune`, from that run in runs/china, and `:scratch`
are the same 200 steps on the few crops of flower.jpg.
"""

from configs import base


def get_config(part="finetune"):
    config = base.jet()
    config.flow.patch_size = 2
    config.flow.width = 64
    config.flow.num_heads = 2
    config.flow.num_couplings = 8
    config.flow.block_depth = 1
    config.optim.lr = 1e-3
    config.train.log_every = 20
    if part == "pretrain":
        config.data.name = "photos/china8"
        config.train.steps = 1000
        config.train.eval_every = 200
    elif part in ("finetune", "scratch"):
        config.data.name = "photos/flower8"
        config.data.train_split = "train[:256]"
        config.train.steps = 200
        config.train.eval_every = 20
        config.init_from = "runs/china" if part == "finetune" else ""
    else:
        raise ValueError(f"{part!r} is no part; expected pretrain, finetune or scratch")
    return config
