"""Published checkpoints as jetflow's flows and variables, and TarFlow's back."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jetflow.convert import big_vision, tables, torch_file, torch_writer
from jetflow.convert.mapping import Tensors, Variables, from_published, to_published
from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.build import build
from jetflow.flows.pixels import Pixels
from jetflow.flows.stack import Stack
from jetflow.state import abstract_variables
from jetflow.types import Flow, UsageError


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


def tarflow(
    path: str | os.PathLike,
    *,
    image_size: int,
    channels: int,
    patch_size: int,
    pixel_scale: float = 127.5,
    head_dim: int = 64,
) -> tuple[Stack, Variables]:
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
            noise, 128 in those with uniform noise.
        head_dim: features of an attention head; 64 in the published models.

    Raises:
        UsageError: if the file cannot be read, or its tensors are not of such a model.
    """
    published = read_tarflow(
        path, image_size=image_size, channels=channels, patch_size=patch_size,
        pixel_scale=pixel_scale, head_dim=head_dim,
    )  # fmt: skip
    return published.flow, published.variables


def jet(
    path: str | os.PathLike,
    *,
    image_shape: tuple[int, int, int],
    patch_size: int,
    num_heads: int,
    kinds: Sequence[str],
    scale_factor: float = 2.0,
) -> tuple[Stack, Variables]:
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
    published = read_jet(
        path, image_shape=image_shape, patch_size=patch_size, num_heads=num_heads, kinds=kinds,
        scale_factor=scale_factor,
    )  # fmt: skip
    return published.flow, published.variables


def to_tarflow(path: str | os.PathLike, flow: Flow, variables: Variables) -> None:
    """Write a TarFlow as a state dict of apple/ml-tarflow, which `torch.load` reads.

    Raises:
        UsageError: if the flow is no TarFlow.
    """
    if not isinstance(flow, Stack) or not all(
        isinstance(block, AutoregressiveBlock) for block in flow.blocks
    ):
        raise UsageError("only a TarFlow can be written as a .pth of apple/ml-tarflow")
    tensors = to_published(tables.TARFLOW, variables)
    tokens, _ = flow.latent_shape
    for block in range(len(flow.blocks)):
        tensors[f"blocks.{block}.attn_mask"] = np.tril(np.ones((tokens, tokens), np.float32))
    tensors.setdefault("var", np.ones(flow.latent_shape, np.float32))
    torch_writer.write(path, tensors)


def read_tarflow(
    path: str | os.PathLike, *, image_size: int, channels: int, patch_size: int,
    pixel_scale: float, head_dim: int,
) -> Published:  # fmt: skip
    """See `tarflow`."""
    tensors = torch_file.read(path)
    width, features = _shape(path, tensors, "blocks.0.proj_in.weight", 2)
    tokens, _ = _shape(path, tensors, "blocks.0.pos_embed", 2)
    outputs, _ = _shape(path, tensors, "blocks.0.proj_out.weight", 2)
    image_shape = (image_size, image_size, channels)
    given = Pixels(image_shape, patch_size, pixel_scale, "chw").token_shape
    _check(f"image_size {image_size}, channels {channels}", patch_size, given, (tokens, features))
    blocks = _count(tensors, r"blocks\.(\d+)\..*")
    section = {
        "kind": "tarflow",
        "patch_size": patch_size,
        "width": width,
        "num_blocks": blocks,
        "layers_per_block": tuple(
            _count(tensors, rf"blocks\.{block}\.attn_blocks\.(\d+)\..*") for block in range(blocks)
        ),
        "head_dim": head_dim,
        "volume_preserving": outputs == features,
        "pixel_scale": pixel_scale,
    }
    num_classes = len(tensors.get("blocks.0.class_embed", ()))
    return _published(path, tables.TARFLOW, tensors, section, image_shape, num_classes)


def read_jet(
    path: str | os.PathLike, *, image_shape: tuple[int, int, int], patch_size: int,
    num_heads: int, kinds: Sequence[str], scale_factor: float,
) -> Published:  # fmt: skip
    """See `jet`."""
    tensors = big_vision.read(path)
    couplings, half, width = _shape(path, tensors, "couplings/dnn/init_proj/kernel", 3)
    _, _, tokens, _ = _shape(path, tensors, "couplings/dnn/posemb", 4)
    query = "couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    heads = _shape(path, tensors, query, 4)[2]
    given = Pixels(image_shape, patch_size, 127.5, "hwc").token_shape
    _check(f"image_shape {image_shape}", patch_size, given, (tokens, 2 * half))
    if num_heads != heads:
        raise UsageError(f"num_heads is {num_heads}, but {path} has {heads}; set it to that")
    section = {
        "kind": "jet",
        "patch_size": patch_size,
        "width": width,
        "num_heads": num_heads,
        "num_couplings": couplings,
        "block_depth": _count(tensors, r"couplings/dnn/vit/encoderblock_(\d+)/.*"),
        "kinds": tuple(kinds),
        "scale_factor": scale_factor,
    }
    published = _published(path, tables.JET, tensors, section, image_shape, num_classes=0)
    spatial = np.asarray(published.variables["constants"]["blocks_0"]["spatial"])
    there = ["spatial" if is_spatial else "channels" for is_spatial in spatial]
    if there != [kinds[layer % len(kinds)] for layer in range(couplings)]:
        raise UsageError(
            f"kinds is {tuple(kinds)}, but the couplings of {path} are {', '.join(there)}; "
            "set it to their cycle"
        )
    return published


def _published(path, table, tensors, section, image_shape, num_classes) -> Published:
    published = Published(section, image_shape, num_classes, {})
    wanted = abstract_variables(published.flow)
    try:
        return published._replace(variables=from_published(table, tensors, wanted))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _shape(path, tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that the sizes of the model are read off."""
    if name not in tensors:
        first = ", ".join(list(tensors)[:3])
        raise UsageError(f"{path} is not of this model: it has no tensor {name}, but {first}, …")
    if tensors[name].ndim != axes:
        raise UsageError(f"{path}: {name} is {tensors[name].shape}; expected {axes} axes")
    return tensors[name].shape


def _check(image: str, patch_size: int, given: tuple[int, int], there: tuple[int, int]) -> None:
    if given != there:
        raise UsageError(
            f"{image} and patch_size {patch_size} make {given[0]} patches of {given[1]} features, "
            f"but the checkpoint has {there[0]} of {there[1]}; correct them"
        )


def _count(tensors: Tensors, pattern: str) -> int:
    """One more than the highest number that the names have there."""
    found = [match for name in tensors if (match := re.fullmatch(pattern, name))]
    return max((int(match[1]) for match in found), default=0) + 1
