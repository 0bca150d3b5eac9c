"""The tensors of the two published models, and which of jetflow's variables they are."""

import numpy as np

from jetflow.tools.convert.mapping import Layout, Row, Table


def _orders(masks: np.ndarray) -> np.ndarray:
    """0/1 matrices [L, N, N], x_new = x·mask, to orders [L, N]; a zero matrix is no change."""
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"split matrices are {masks.shape}; expected (layers, N, N)")
    used = is_split(masks)
    permutes = ((masks == 0) | (masks == 1)).all() and (masks[used].sum(1) == 1).all()
    if not permutes or not (masks[used].sum(2) == 1).all():
        raise ValueError("a split matrix is no permutation, with one 1 in each row and column")
    return np.where(used[:, None], masks.argmax(1), np.arange(masks.shape[1])).astype(np.int32)


def is_split(masks: np.ndarray) -> np.ndarray:
    """Of each layer, whether its split is of this kind."""
    return masks.max((1, 2)) != 0  # a matrix of 0 and 1, see `_orders`


def _single(array: np.ndarray) -> np.ndarray:
    """Without the second axis, of one entry."""
    return np.squeeze(array, axis=1)


def _heads_out(heads: tuple[int, int]) -> Layout:
    """[L, ..., heads, H] with the heads side by side, [L, ..., heads·H]."""

    def read(array: np.ndarray) -> np.ndarray:
        _check_heads(array.shape[-2:], heads)
        return array.reshape(*array.shape[:-2], -1)

    return Layout(read)


def _heads_in(heads: tuple[int, int]) -> Layout:
    """[L, heads, H, W] with the heads side by side, [L, heads·H, W]."""

    def read(array: np.ndarray) -> np.ndarray:
        _check_heads(array.shape[1:3], heads)
        return array.reshape(array.shape[0], -1, *array.shape[3:])

    return Layout(read)


def _check_heads(there: tuple[int, ...], heads: tuple[int, int]) -> None:
    if there != heads:
        raise ValueError(f"the axes of the heads are {there}, not {heads}")


SAME = Layout(lambda array: array, lambda array: array)
LINEAR = Layout(np.transpose, np.transpose)  # torch keeps [out, in], flax [in, out]
CLASSES = Layout(_single, lambda array: array[:, None])  # [classes, 1, W]
POSITION = Layout(_single)  # [L, 1, T, W]
ORDERS = Layout(_orders)
IS_SPLIT = Layout(is_split)

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


def jet(num_heads: int, width: int) -> Table:
    """The tensors of a Jet, whose attention heads have an axis of their own there."""
    heads = (num_heads, width // num_heads)
    heads_out, heads_in = _heads_out(heads), _heads_in(heads)
    rows = (
        Row("couplings/dnn/init_proj/kernel", _NET + "proj_in/kernel", SAME),
        Row("couplings/dnn/init_proj/bias", _NET + "proj_in/bias", SAME),
        Row("couplings/dnn/posemb", _NET + "position", POSITION),
        Row(_VIT + "LayerNorm_0/scale", _NET + "layers/norm_attention/scale", SAME),
        Row(_VIT + "LayerNorm_0/bias", _NET + "layers/norm_attention/bias", SAME),
        Row(_HEADS + "query/kernel", _NET + "layers/qkv/kernel", heads_out, (0, 3)),
        Row(_HEADS + "query/bias", _NET + "layers/qkv/bias", heads_out, (0, 3)),
        Row(_HEADS + "key/kernel", _NET + "layers/qkv/kernel", heads_out, (1, 3)),
        Row(_HEADS + "key/bias", _NET + "layers/qkv/bias", heads_out, (1, 3)),
        Row(_HEADS + "value/kernel", _NET + "layers/qkv/kernel", heads_out, (2, 3)),
        Row(_HEADS + "value/bias", _NET + "layers/qkv/bias", heads_out, (2, 3)),
        Row(_HEADS + "out/kernel", _NET + "layers/out/kernel", heads_in),
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
    return Table(rows, constants={}, layer_axis=1)
