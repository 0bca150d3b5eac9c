"""The tensors of the two published models, and which of jetflow's variables they are."""

import numpy as np

from jetflow.convert.mapping import Layout, Row, Table


def _orders(masks: np.ndarray) -> np.ndarray:
    """0/1 matrices [L, N, N], x_new = x·mask, to orders [L, N]; a zero matrix is no change."""
    size = masks.shape[-1]
    used = masks.max((1, 2)) > 0
    permutes = ((masks == 0) | (masks == 1)).all() and (masks[used].sum(1) == 1).all()
    if not permutes or not (masks[used].sum(2) == 1).all():
        raise ValueError("a split matrix is no permutation, with one 1 in each row and column")
    return np.where(used[:, None], masks.argmax(1), np.arange(size)).astype(np.int32)


SAME = Layout(lambda a: a)
LINEAR = Layout(np.transpose, np.transpose)  # torch keeps [out, in], flax [in, out]
CLASSES = Layout(lambda a: a[:, 0], lambda a: a[:, None])  # [classes, 1, W]
POSITION = Layout(lambda a: a[:, 0])  # [L, 1, T, W]
HEADS_OUT = Layout(lambda a: a.reshape(*a.shape[:2], -1))  # [L, W, heads, H]
HEADS_BIAS = Layout(lambda a: a.reshape(a.shape[0], -1))  # [L, heads, H]
HEADS_IN = Layout(lambda a: a.reshape(a.shape[0], -1, a.shape[-1]))  # [L, heads, H, W]
ORDERS = Layout(_orders)
IS_SPLIT = Layout(lambda masks: masks.max((1, 2)) > 0)

_BLOCK = "params/blocks_{block}/"
_LAYERS = _BLOCK + "transformer/layers/"
_ATTENTION = "blocks.{block}.attn_blocks.{layer}.attention."
_MLP = "blocks.{block}.attn_blocks.{layer}.mlp."

_TARFLOW_ROWS = (
    Row("var", "prior/variance", SAME),
    Row("blocks.{block}.pos_embed", _BLOCK + "position", SAME),
    Row("blocks.{block}.class_embed", _BLOCK + "class_embedding", CLASSES),
    Row("blocks.{block}.proj_in.weight", _BLOCK + "proj_in/kernel", LINEAR),
    Row("blocks.{block}.proj_in.bias", _BLOCK + "proj_in/bias", SAME),
    Row(_ATTENTION + "norm.weight", _LAYERS + "norm_attention/scale", SAME),
    Row(_ATTENTION + "norm.bias", _LAYERS + "norm_attention/bias", SAME),
    Row(_ATTENTION + "qkv.weight", _LAYERS + "qkv/kernel", LINEAR),
    Row(_ATTENTION + "qkv.bias", _LAYERS + "qkv/bias", SAME),
    Row(_ATTENTION + "proj.weight", _LAYERS + "out/kernel", LINEAR),
    Row(_ATTENTION + "proj.bias", _LAYERS + "out/bias", SAME),
    Row(_MLP + "norm.weight", _LAYERS + "norm_mlp/scale", SAME),
    Row(_MLP + "norm.bias", _LAYERS + "norm_mlp/bias", SAME),
    Row(_MLP + "main.0.weight", _LAYERS + "mlp_in/kernel", LINEAR),
    Row(_MLP + "main.0.bias", _LAYERS + "mlp_in/bias", SAME),
    Row(_MLP + "main.2.weight", _LAYERS + "mlp_out/kernel", LINEAR),
    Row(_MLP + "main.2.bias", _LAYERS + "mlp_out/bias", SAME),
    Row("blocks.{block}.proj_out.weight", _BLOCK + "proj_out/kernel", LINEAR),
    Row("blocks.{block}.proj_out.bias", _BLOCK + "proj_out/bias", SAME),
)

TARFLOW = Table(
    _TARFLOW_ROWS,
    constants={
        "blocks.{block}.attn_mask": lambda mask: np.tril(np.ones_like(mask)),
        "var": np.ones_like,  # a parameter in the volume-preserving variant alone
    },
    layer_axis=0,
)

_NET = "params/blocks_0/layers/net/"
_VIT = "couplings/dnn/vit/encoderblock_{layer}/"
_HEADS = _VIT + "MultiHeadDotProductAttention_0/"

_JET_ROWS = (
    Row("couplings/dnn/init_proj/kernel", _NET + "proj_in/kernel", SAME),
    Row("couplings/dnn/init_proj/bias", _NET + "proj_in/bias", SAME),
    Row("couplings/dnn/posemb", _NET + "position", POSITION),
    Row(_VIT + "LayerNorm_0/scale", _NET + "layers/norm_attention/scale", SAME),
    Row(_VIT + "LayerNorm_0/bias", _NET + "layers/norm_attention/bias", SAME),
    Row(_HEADS + "query/kernel", _NET + "layers/qkv/kernel", HEADS_OUT, (0, 3)),
    Row(_HEADS + "query/bias", _NET + "layers/qkv/bias", HEADS_BIAS, (0, 3)),
    Row(_HEADS + "key/kernel", _NET + "layers/qkv/kernel", HEADS_OUT, (1, 3)),
    Row(_HEADS + "key/bias", _NET + "layers/qkv/bias", HEADS_BIAS, (1, 3)),
    Row(_HEADS + "value/kernel", _NET + "layers/qkv/kernel", HEADS_OUT, (2, 3)),
    Row(_HEADS + "value/bias", _NET + "layers/qkv/bias", HEADS_BIAS, (2, 3)),
    Row(_HEADS + "out/kernel", _NET + "layers/out/kernel", HEADS_IN),
    Row(_HEADS + "out/bias", _NET + "layers/out/bias", SAME),
    Row(_VIT + "LayerNorm_1/scale", _NET + "layers/norm_mlp/scale", SAME),
    Row(_VIT + "LayerNorm_1/bias", _NET + "layers/norm_mlp/bias", SAME),
    Row(_VIT + "MlpBlock_0/Dense_0/kernel", _NET + "layers/mlp_in/kernel", SAME),
    Row(_VIT + "MlpBlock_0/Dense_0/bias", _NET + "layers/mlp_in/bias", SAME),
    Row(_VIT + "MlpBlock_0/Dense_1/kernel", _NET + "layers/mlp_out/kernel", SAME),
    Row(_VIT + "MlpBlock_0/Dense_1/bias", _NET + "layers/mlp_out/bias", SAME),
    Row("couplings/dnn/vit/encoder_norm/scale", _NET + "norm/scale", SAME),
    Row("couplings/dnn/vit/encoder_norm/bias", _NET + "norm/bias", SAME),
    Row("couplings/dnn/final_proj/kernel", _NET + "proj_out/kernel", SAME),
    Row("couplings/dnn/final_proj/bias", _NET + "proj_out/bias", SAME),
    Row("channel_coupling_masks-FREEZE_ME", "constants/blocks_0/feature_order", ORDERS),
    Row("spatial_coupling_masks-FREEZE_ME", "constants/blocks_0/token_order", ORDERS),
    Row("spatial_coupling_masks-FREEZE_ME", "constants/blocks_0/spatial", IS_SPLIT),
)
JET = Table(_JET_ROWS, constants={}, layer_axis=1)
