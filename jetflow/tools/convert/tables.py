"""The tensors of the two published models, and which of jetflow's variables they are."""

from collections.abc import Callable

import numpy as np

from jetflow.tools.convert.mapping import Row, Table


def is_split(masks: np.ndarray) -> np.ndarray:
    """Of each layer, whether its split is of this kind; a matrix of zeros is none."""
    return masks.max((1, 2)) != 0


def _orders(masks: np.ndarray) -> np.ndarray:
    """0/1 matrices [L, N, N], x_new = x·mask, to orders [L, N]; a zero matrix is no change."""
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"split matrices are {masks.shape}; expected (layers, N, N)")
    used = is_split(masks)
    permutes = ((masks == 0) | (masks == 1)).all() and (masks[used].sum(1) == 1).all()
    if not permutes or not (masks[used].sum(2) == 1).all():
        raise ValueError("a split matrix is no permutation, with one 1 in each row and column")
    return np.where(used[:, None], masks.argmax(1), np.arange(masks.shape[1])).astype(np.int32)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _single(array: np.ndarray) -> np.ndarray:
    """Without the second axis, of one entry."""
    return np.squeeze(array, axis=1)


# name of a torch module -> path of the variable; torch keeps [out, in], flax [in, out].
_LINEAR = {
    "proj_in": "proj_in",
    "attn_blocks.{layer}.attention.qkv": "transformer/layers/qkv",
    "attn_blocks.{layer}.attention.proj": "transformer/layers/out",
    "attn_blocks.{layer}.mlp.main.0": "transformer/layers/mlp_in",
    "attn_blocks.{layer}.mlp.main.2": "transformer/layers/mlp_out",
    "proj_out": "proj_out",
}
_NORMS = {
    "attn_blocks.{layer}.attention.norm": "transformer/layers/norm_attention",
    "attn_blocks.{layer}.mlp.norm": "transformer/layers/norm_mlp",
}
_BLOCK, _TORCH_BLOCK = "params/blocks_{block}/", "blocks.{block}."


def _tarflow_rows() -> list[Row]:
    rows = [
        Row("prior/variance", ("var",), _same, _same),
        Row(f"{_BLOCK}position", (f"{_TORCH_BLOCK}pos_embed",), _same, _same),
        Row(f"{_BLOCK}class_embedding", (f"{_TORCH_BLOCK}class_embed",), _single,
            lambda array: array[:, None]),
    ]  # fmt: skip
    for name, path in _LINEAR.items():
        weight, bias = (f"{_TORCH_BLOCK}{name}.{part}" for part in ("weight", "bias"))
        rows.append(Row(f"{_BLOCK}{path}/kernel", (weight,), np.transpose, np.transpose))
        rows.append(Row(f"{_BLOCK}{path}/bias", (bias,), _same, _same))
    for name, path in _NORMS.items():
        weight, bias = (f"{_TORCH_BLOCK}{name}.{part}" for part in ("weight", "bias"))
        rows.append(Row(f"{_BLOCK}{path}/scale", (weight,), _same, _same))
        rows.append(Row(f"{_BLOCK}{path}/bias", (bias,), _same, _same))
    return rows


TARFLOW = Table(
    _tarflow_rows(),
    constants={
        "blocks.{block}.attn_mask": lambda mask: np.tril(np.ones_like(mask)),
        "var": np.ones_like,  # a parameter in the volume-preserving variant alone
    },
    layer_axis=0,
)

# path of a Jet's variable, in its net -> published names.
_VIT = "couplings/dnn/vit/encoderblock_{layer}/"
_JET = {
    "proj_in/kernel": "couplings/dnn/init_proj/kernel",
    "proj_in/bias": "couplings/dnn/init_proj/bias",
    "layers/norm_attention/scale": _VIT + "LayerNorm_0/scale",
    "layers/norm_attention/bias": _VIT + "LayerNorm_0/bias",
    "layers/out/bias": _VIT + "MultiHeadDotProductAttention_0/out/bias",
    "layers/norm_mlp/scale": _VIT + "LayerNorm_1/scale",
    "layers/norm_mlp/bias": _VIT + "LayerNorm_1/bias",
    "layers/mlp_in/kernel": _VIT + "MlpBlock_0/Dense_0/kernel",
    "layers/mlp_in/bias": _VIT + "MlpBlock_0/Dense_0/bias",
    "layers/mlp_out/kernel": _VIT + "MlpBlock_0/Dense_1/kernel",
    "layers/mlp_out/bias": _VIT + "MlpBlock_0/Dense_1/bias",
    "norm/scale": "couplings/dnn/vit/encoder_norm/scale",
    "norm/bias": "couplings/dnn/vit/encoder_norm/bias",
    "proj_out/kernel": "couplings/dnn/final_proj/kernel",
    "proj_out/bias": "couplings/dnn/final_proj/bias",
}
MASKS = {kind: f"{kind}_coupling_masks-FREEZE_ME" for kind in ("channel", "spatial")}


def jet(num_heads: int, width: int) -> Table:
    """The tensors of a Jet; in the published arrays the attention heads have their own axis."""
    net, attention = "params/blocks_0/layers/net/", _VIT + "MultiHeadDotProductAttention_0/"
    rows = [Row(net + path, (name,), _same) for path, name in _JET.items()]
    merge_last = _merge_heads(num_heads, width, slice(-2, None))
    for part in ("kernel", "bias"):
        names = tuple(f"{attention}{name}/{part}" for name in ("query", "key", "value"))
        side_by_side = lambda *arrays: np.concatenate([*map(merge_last, arrays)], -1)  # noqa: E731
        rows.append(Row(f"{net}layers/qkv/{part}", names, side_by_side))
    rows += [
        Row(net + "layers/out/kernel", (attention + "out/kernel",),
            _merge_heads(num_heads, width, slice(1, 3))),
        Row(net + "position", ("couplings/dnn/posemb",), _single),
        Row("constants/blocks_0/feature_order", (MASKS["channel"],), _orders),
        Row("constants/blocks_0/token_order", (MASKS["spatial"],), _orders),
        Row("constants/blocks_0/spatial", (MASKS["spatial"],), is_split),
    ]  # fmt: skip
    return Table(rows, constants={}, layer_axis=1)


def _merge_heads(num_heads: int, width: int, axes: slice) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the axes (heads, features of a head) one, of the width."""

    def merge(array: np.ndarray) -> np.ndarray:
        stored, expected = array.shape[axes], (num_heads, width // num_heads)
        if stored != expected:
            raise ValueError(f"the axes of the heads are {stored}, not {expected}")
        after = array.shape[axes.stop :] if axes.stop else ()
        return array.reshape(*array.shape[: axes.start], width, *after)

    return merge
