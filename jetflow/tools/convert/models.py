"""Published checkpoints as jetflow's flows and variables, and TarFlow's back."""

import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.build import build
from jetflow.flows.pixels import Pixels
from jetflow.flows.stack import Stack
from jetflow.pth import read_pth, write_pth
from jetflow.tools.convert import big_vision, tables
from jetflow.tools.convert.mapping import Table, Tensors, Variables, from_published, to_published
from jetflow.training.step import abstract_variables
from jetflow.types import Flow, UsageError

HEAD_DIM = 64  # of every published TarFlow, whose files do not say it


class Published(NamedTuple):
    """A published model.

    Attributes:
        section: what `jetflow.build` makes its flow of.
        image_shape, num_classes: the flow's.
        variables: the flow's.
    """

    section: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    variables: Variables

    @property
    def flow(self) -> Stack:
        return build(self.section, image_shape=self.image_shape, num_classes=self.num_classes)


def tarflow(path: str | os.PathLike, **sizes: Any) -> tuple[Stack, Variables]:
    """The flow and variables of a state dict of apple/ml-tarflow; arguments as `read_tarflow`."""
    published = read_tarflow(path, **sizes)
    return published.flow, published.variables


def jet(path: str | os.PathLike, **sizes: Any) -> tuple[Stack, Variables]:
    """The flow and variables of a Jet of google-research/big_vision; arguments as `read_jet`."""
    published = read_jet(path, **sizes)
    return published.flow, published.variables


def read_tarflow(
    path: str | os.PathLike,
    *,
    image_size: int,
    channels: int,
    patch_size: int,
    pixel_scale: float = 127.5,
    head_dim: int = HEAD_DIM,
) -> Published:
    """The model of a state dict of apple/ml-tarflow.

    Blocks, depths, width, classes and the volume-preserving variant are read off the tensors. The
    published sampler takes the label -1 for the index of its last class; here it means no label
    (the mean over the class embeddings) in sampling as it does in training.

    Args:
        path: a .pth file, in PyTorch's zip or legacy format.
        image_size: height and width in pixels.
        channels: of the image.
        patch_size: in pixels.
        pixel_scale: pixels v become v / pixel_scale - 1: 127.5 in the models trained with gaussian
            noise, 128 in that with uniform noise. The file does not tell them apart; all but one of
            the published models have gaussian noise, hence the default.
        head_dim: features of an attention head; 64 in the published models.

    Raises:
        UsageError: if the file cannot be read, or its tensors are not of such a model.
    """
    _check_positive(image_size=image_size, channels=channels, patch_size=patch_size)
    _check_positive(pixel_scale=pixel_scale, head_dim=head_dim)
    tensors = read_pth(path)
    width, features = _shape(path, tensors, "blocks.0.proj_in.weight", 2)
    tokens, _ = _shape(path, tensors, "blocks.0.pos_embed", 2)
    outputs, _ = _shape(path, tensors, "blocks.0.proj_out.weight", 2)
    classes = "blocks.0.class_embed"
    num_classes = _shape(path, tensors, classes, 3)[0] if classes in tensors else 0
    image_shape = (image_size, image_size, channels)
    pixels = Pixels(image_shape, patch_size, pixel_scale, "chw")
    _check_patches(f"image_size {image_size}, channels {channels}", pixels, (tokens, features))
    blocks = _count(tensors, "blocks.")
    depths = [_count(tensors, f"blocks.{block}.attn_blocks.") for block in range(blocks)]
    section = {
        "kind": "tarflow",
        "patch_size": patch_size,
        "width": width,
        "num_blocks": blocks,
        "layers_per_block": tuple(depths),
        "head_dim": head_dim,
        "volume_preserving": outputs == features,
        "pixel_scale": pixel_scale,
    }
    return _published(
        path, tables.TARFLOW, tensors, Published(section, image_shape, num_classes, {})
    )


def read_jet(
    path: str | os.PathLike,
    *,
    image_shape: Sequence[int],
    patch_size: int,
    num_heads: int,
    kinds: Sequence[str],
    scale_factor: float = 2.0,
) -> Published:
    """The model of a Jet checkpoint of google-research/big_vision.

    Couplings, their depth and width are read off the tensors, and so are the splits.

    Args:
        path: an .npz with or without the prefix `params/`, a `checkpoint.bv-…` folder, or a workdir
            with the pointer `checkpoint.bv-LAST`.
        image_shape: (height, width, channels).
        patch_size: in pixels.
        num_heads: attention heads.
        kinds: the cycle of the couplings' splits, "channels" or "spatial".
        scale_factor: a coupling scales a dimension by less than this.

    Raises:
        UsageError: if the checkpoint cannot be read, or its tensors are not of such a model.
    """
    if len(image_shape) != 3:
        raise UsageError(f"image_shape is {image_shape}; expected (height, width, channels)")
    height, width, channels = image_shape
    _check_positive(height=height, width=width, channels=channels)
    _check_positive(patch_size=patch_size, scale_factor=scale_factor)
    tensors = big_vision.read(path)
    couplings, half, features = _shape(path, tensors, "couplings/dnn/init_proj/kernel", 3)
    _, _, tokens, _ = _shape(path, tensors, "couplings/dnn/posemb", 4)
    query = "couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    heads = _shape(path, tensors, query, 4)[2]
    pixels = Pixels((height, width, channels), patch_size, 127.5, "hwc")
    _check_patches(f"image_shape {tuple(image_shape)}", pixels, (tokens, 2 * half))
    if num_heads != heads:
        raise UsageError(f"num_heads is {num_heads}, but {path} has {heads}; set it to that")
    section = {
        "kind": "jet",
        "patch_size": patch_size,
        "width": features,
        "num_heads": num_heads,
        "num_couplings": couplings,
        "block_depth": _count(tensors, "couplings/dnn/vit/encoderblock_"),
        "kinds": tuple(kinds),
        "scale_factor": scale_factor,
    }
    published = Published(section, (height, width, channels), 0, {})
    published = _published(path, tables.jet(num_heads, features), tensors, published)
    _check_kinds(path, tensors, kinds)
    return published


def to_tarflow(path: Path, flow: Flow, variables: Variables) -> None:
    """Write a TarFlow as a state dict of apple/ml-tarflow, which `torch.load` reads.

    Raises:
        UsageError: if the flow is no TarFlow, or one that the published code would read as another.
    """
    blocks = flow.blocks if isinstance(flow, Stack) else ()
    if not blocks or not all(isinstance(block, AutoregressiveBlock) for block in blocks):
        raise UsageError("only a TarFlow can be written as a .pth; give the workdir of a TarFlow")
    nets = [block.transformer for block in blocks]  # type: ignore[attr-defined]
    for head_dim in {net.width // net.num_heads for net in nets} - {HEAD_DIM}:
        raise UsageError(
            f"config.flow.head_dim is {head_dim}, but apple/ml-tarflow divides every width into "
            f"heads of {HEAD_DIM} and would read another model; train with head_dim {HEAD_DIM}"
        )
    tensors = to_published(tables.TARFLOW, variables)
    tokens, _ = flow.latent_shape
    for block in range(len(blocks)):
        tensors[f"blocks.{block}.attn_mask"] = np.tril(np.ones((tokens, tokens), np.float32))
    tensors.setdefault("var", np.ones(flow.latent_shape, np.float32))
    write_pth(path, tensors)


def _published(path: Any, table: Table, tensors: Tensors, published: Published) -> Published:
    """The model with its variables."""
    wanted = abstract_variables(published.flow)
    try:
        return published._replace(variables=from_published(table, tensors, wanted))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _check_kinds(path: Any, tensors: Tensors, kinds: Sequence[str]) -> None:
    """Raise if the couplings' splits are not those of the cycle `kinds`."""
    channel, spatial = (tables.is_split(tensors[name]) for name in tables.MASKS.values())
    if wrong := np.flatnonzero(channel == spatial).tolist():
        raise UsageError(
            f"{path}: the couplings {wrong} have split matrices of both kinds or of none; expected "
            "exactly one that is not zero; check that the checkpoint is of this model"
        )
    stored = ["spatial" if is_spatial else "channels" for is_spatial in spatial]
    if stored != [kinds[layer % len(kinds)] for layer in range(len(stored))]:
        raise UsageError(
            f"kinds is {tuple(kinds)}, but the couplings of {path} are {', '.join(stored)}; "
            "set it to their cycle"
        )


def _shape(path: Any, tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes of the model are read off."""
    if name not in tensors:
        first = ", ".join(map(repr, list(tensors)[:3]))
        raise UsageError(
            f"{path} is not of this model: it has no tensor {name}, but {first}, …; give a "
            "checkpoint of the model itself"
        )
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise UsageError(
            f"{path}: {name} is {shape}; expected {axes} axes, none of them empty; check that the "
            "checkpoint is of this model"
        )
    return shape


def _check_patches(image: str, pixels: Pixels, stored: tuple[int, int]) -> None:
    """Raise unless an image makes the (tokens, features) that the checkpoint has."""
    tokens, features = pixels.token_shape
    if (tokens, features) != stored:
        raise UsageError(
            f"{image} and patch_size {pixels.patch_size} make {tokens} patches of {features} "
            f"features, but the checkpoint has {stored[0]} of {stored[1]}; correct them"
        )


def _check_positive(**values: float | int) -> None:
    """Raise a UsageError for the first that is not a number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value}; expected a number above 0")


def _count(tensors: Tensors, prefix: str) -> int:
    """How many parts the names have that begin with `prefix` and a number: 0, 1, 2, … to a gap."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)[./]")
    numbers = {match[1] for name in tensors if (match := pattern.match(name))}
    return max(1, next(n for n in itertools.count() if str(n) not in numbers))
