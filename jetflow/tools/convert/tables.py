"""The tensors of the published models, and which of jetflow's variables they are."""

from collections.abc import Callable, Sequence

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


# What the module of a block's layers is called, in TarFlow and in iTARFlow.
LAYERS = {False: "attn_blocks", True: "head_blocks"}
# name of a torch module -> path of the variable; torch keeps [out, in], flax [in, out].
_TARFLOW = {
    "proj_in": "proj_in",
    "{layer}.attention.norm": "transformer/layers/norm_attention",
    "{layer}.attention.qkv": "transformer/layers/qkv",
    "{layer}.attention.proj": "transformer/layers/out",
    "{layer}.mlp.norm": "transformer/layers/norm_mlp",
    "{layer}.mlp.main.0": "transformer/layers/mlp_in",
    "{layer}.mlp.main.2": "transformer/layers/mlp_out",
    "proj_out": "proj_out",
    "time_embed.mlp.0": "level_embedding/mlp_in",
    "time_embed.mlp.2": "level_embedding/mlp_out",
}
# Of a layer's kernel and bias, how they are read and written: [W, 3, W] and [3, W] here.
_QKV = (
    (
        lambda array: array.T.reshape(array.shape[1], 3, -1),
        lambda array: array.reshape(len(array), -1).T,
    ),
    (lambda array: array.reshape(3, -1), np.ravel),
)


def tarflow(depths: Sequence[int], noise_conditional: bool) -> Table:
    """The tensors of a TarFlow or iTARFlow, whose blocks have so many layers."""
    rows = {"prior/variance": Row([["var"]], _same, _same)}
    # The variance is a parameter in the volume-preserving variant alone.
    constants: dict[str, Callable[[np.ndarray], np.ndarray]] = {"var": np.ones_like}
    for block, depth in enumerate(depths):
        ours, theirs = f"params/blocks_{block}/", f"blocks.{block}."
        rows[f"{ours}position"] = Row([[f"{theirs}pos_embed"]], _same, _same)
        rows[f"{ours}class_embedding"] = Row(
            [[f"{theirs}class_embed"]], _single, lambda array: array[:, None]
        )
        constants[f"{theirs}attn_mask"] = lambda mask: np.tril(np.ones_like(mask))
        for name, path in _TARFLOW.items():
            is_stacked = "{layer}" in name
            numbered = [f"{LAYERS[noise_conditional]}.{n}" for n in range(depth)]
            layers = [theirs + name.format(layer=n) for n in numbered[: None if is_stacked else 1]]
            weight, turn = ("scale", _same) if "norm" in name else ("kernel", np.transpose)
            kernel, bias = _QKV if "qkv" in name else ((turn, turn), (_same, _same))
            for part, end, change in (("weight", weight, kernel), ("bias", "bias", bias)):
                names = [[f"{layer}.{part}"] for layer in layers]
                axis = 0 if is_stacked else None
                rows[f"{ours}{path}/{end}"] = Row(names, *change, axis=axis)
    return Table(rows, constants)


# path of a Jet's variable, in its net -> published names; {} is a layer's.
_ATTENTION = "{}MultiHeadDotProductAttention_0/"
_JET = {
    "proj_in/kernel": "couplings/dnn/init_proj/kernel",
    "proj_in/bias": "couplings/dnn/init_proj/bias",
    "layers/norm_attention/scale": "{}LayerNorm_0/scale",
    "layers/norm_attention/bias": "{}LayerNorm_0/bias",
    "layers/out/bias": _ATTENTION + "out/bias",
    "layers/norm_mlp/scale": "{}LayerNorm_1/scale",
    "layers/norm_mlp/bias": "{}LayerNorm_1/bias",
    "layers/mlp_in/kernel": "{}MlpBlock_0/Dense_0/kernel",
    "layers/mlp_in/bias": "{}MlpBlock_0/Dense_0/bias",
    "layers/mlp_out/kernel": "{}MlpBlock_0/Dense_1/kernel",
    "layers/mlp_out/bias": "{}MlpBlock_0/Dense_1/bias",
    "norm/scale": "couplings/dnn/vit/encoder_norm/scale",
    "norm/bias": "couplings/dnn/vit/encoder_norm/bias",
    "proj_out/kernel": "couplings/dnn/final_proj/kernel",
    "proj_out/bias": "couplings/dnn/final_proj/bias",
}
MASKS = {kind: f"{kind}_coupling_masks-FREEZE_ME" for kind in ("channel", "spatial")}


def jet(num_heads: int, width: int, depth: int) -> Table:
    """The tensors of a Jet; in the published arrays the attention heads have their own axis."""
    rows: dict[str, Row] = {}
    net = "params/blocks_0/layers/net/"

    def add(path: str, names: Sequence[str], read: Callable[..., np.ndarray] = _same) -> None:
        is_stacked = "{}" in names[0]
        layers = [f"couplings/dnn/vit/encoderblock_{n}/" for n in range(depth if is_stacked else 1)]
        stacked = [[name.format(layer) for name in names] for layer in layers]
        rows[net + path] = Row(stacked, read, axis=1 if is_stacked else None)

    for path, name in _JET.items():
        add(path, [name])
    merge_last = _merge_heads(num_heads, width, slice(-2, None))
    for part in ("kernel", "bias"):
        names = [f"{_ATTENTION}{name}/{part}" for name in ("query", "key", "value")]
        add(f"layers/qkv/{part}", names, lambda *a: np.stack([*map(merge_last, a)], -2))
    merge = _merge_heads(num_heads, width, slice(1, 3))
    add("layers/out/kernel", [_ATTENTION + "out/kernel"], merge)
    add("position", ["couplings/dnn/posemb"], _single)
    for name, kind, read in (("feature_order", "channel", _orders),
                             ("token_order", "spatial", _orders),
                             ("spatial", "spatial", is_split)):  # fmt: skip
        rows[f"constants/blocks_0/{name}"] = Row([[MASKS[kind]]], read)
    return Table(rows, constants={})


def _merge_heads(num_heads: int, width: int, axes: slice) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the axes (heads, features of a head) one, of the width."""

    def merge(array: np.ndarray) -> np.ndarray:
        stored, expected = array.shape[axes], (num_heads, width // num_heads)
        if stored != expected:
            raise ValueError(f"the axes of the heads are {stored}, not {expected}")
        after = array.shape[axes.stop :] if axes.stop else ()
        return array.reshape(*array.shape[: axes.start], width, *after)

    return merge
