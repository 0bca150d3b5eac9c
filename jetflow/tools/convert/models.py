"""Published checkpoints as jetflow's flows and variables, and TarFlow's back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.build import build
from jetflow.flows.pixels import Pixels
from jetflow.flows.stack import Stack
from jetflow.tools.convert import big_vision, tables, torch_file, torch_writer
from jetflow.tools.convert.mapping import Table, Tensors, Variables, from_published, to_published
from jetflow.tools.convert.sizes import Path, check_patches, check_positive, count_parts, shape_of
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


def tarflow(
    path: Path,
    *,
    image_size: int,
    channels: int,
    patch_size: int,
    pixel_scale: float = 127.5,
    head_dim: int = HEAD_DIM,
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
            noise, 128 in that with uniform noise. The file does not say which one it is; all but
            one of the published models have gaussian noise, hence the default.
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
    path: Path,
    *,
    image_shape: Sequence[int],
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


def to_tarflow(path: Path, flow: Flow, variables: Variables) -> None:
    """Write a TarFlow as a state dict of apple/ml-tarflow, which `torch.load` reads.

    Raises:
        UsageError: if the flow is no TarFlow, or one that the published code would read as another.
    """
    blocks = flow.blocks if isinstance(flow, Stack) else ()
    if not blocks or not all(isinstance(block, AutoregressiveBlock) for block in blocks):
        raise UsageError(
            "only a TarFlow can be written as a .pth of apple/ml-tarflow, and this is none; give "
            "the workdir of a TarFlow"
        )
    for head_dim in {block.width // block.num_heads for block in blocks} - {HEAD_DIM}:  # type: ignore[attr-defined]
        raise UsageError(
            f"config.flow.head_dim is {head_dim}, but apple/ml-tarflow divides every width into "
            f"heads of {HEAD_DIM} and would read another model; train with head_dim {HEAD_DIM}"
        )
    tensors = to_published(tables.TARFLOW, variables)
    tokens, _ = flow.latent_shape
    for block in range(len(blocks)):
        tensors[f"blocks.{block}.attn_mask"] = np.tril(np.ones((tokens, tokens), np.float32))
    tensors.setdefault("var", np.ones(flow.latent_shape, np.float32))
    torch_writer.write(path, tensors)


def read_tarflow(
    path: Path, *, image_size: int, channels: int, patch_size: int, pixel_scale: float,
    head_dim: int,
) -> Published:  # fmt: skip
    """See `tarflow`."""
    check_positive(
        image_size=image_size, channels=channels, patch_size=patch_size, pixel_scale=pixel_scale,
        head_dim=head_dim,
    )  # fmt: skip
    tensors = torch_file.read(path)
    width, features = shape_of(path, tensors, "blocks.0.proj_in.weight", 2)
    tokens, _ = shape_of(path, tensors, "blocks.0.pos_embed", 2)
    outputs, _ = shape_of(path, tensors, "blocks.0.proj_out.weight", 2)
    num_classes = 0
    if "blocks.0.class_embed" in tensors:
        num_classes, _, _ = shape_of(path, tensors, "blocks.0.class_embed", 3)
    image_shape = (image_size, image_size, channels)
    given = Pixels(image_shape, patch_size, pixel_scale, "chw").token_shape
    check_patches(
        f"image_size {image_size}, channels {channels}", patch_size, given, (tokens, features)
    )
    blocks = count_parts(tensors, "blocks.")
    section = {
        "kind": "tarflow",
        "patch_size": patch_size,
        "width": width,
        "num_blocks": blocks,
        "layers_per_block": tuple(
            count_parts(tensors, f"blocks.{block}.attn_blocks.") for block in range(blocks)
        ),
        "head_dim": head_dim,
        "volume_preserving": outputs == features,
        "pixel_scale": pixel_scale,
    }
    return _published(path, tables.TARFLOW, tensors, section, image_shape, num_classes)


def read_jet(
    path: Path, *, image_shape: Sequence[int], patch_size: int, num_heads: int,
    kinds: Sequence[str], scale_factor: float,
) -> Published:  # fmt: skip
    """See `jet`."""
    if len(image_shape) != 3:
        raise UsageError(f"image_shape is {image_shape}; expected (height, width, channels)")
    height, width, channels = image_shape
    check_positive(
        height=height, width=width, channels=channels, patch_size=patch_size,
        scale_factor=scale_factor,
    )  # fmt: skip
    tensors = big_vision.read(path)
    couplings, half, features = shape_of(path, tensors, "couplings/dnn/init_proj/kernel", 3)
    _, _, tokens, _ = shape_of(path, tensors, "couplings/dnn/posemb", 4)
    query = "couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    heads = shape_of(path, tensors, query, 4)[2]
    given = Pixels((height, width, channels), patch_size, 127.5, "hwc").token_shape
    check_patches(f"image_shape {tuple(image_shape)}", patch_size, given, (tokens, 2 * half))
    if num_heads != heads:
        raise UsageError(f"num_heads is {num_heads}, but {path} has {heads}; set it to that")
    section = {
        "kind": "jet",
        "patch_size": patch_size,
        "width": features,
        "num_heads": num_heads,
        "num_couplings": couplings,
        "block_depth": count_parts(tensors, "couplings/dnn/vit/encoderblock_"),
        "kinds": tuple(kinds),
        "scale_factor": scale_factor,
    }
    table = tables.jet(num_heads, features)
    published = _published(path, table, tensors, section, (height, width, channels), 0)
    _check_kinds(path, tensors, kinds)
    return published


def _check_kinds(path: Path, tensors: Tensors, kinds: Sequence[str]) -> None:
    """Raise if the couplings' splits are not those of the cycle `kinds`."""
    masks = [tensors[f"{kind}_coupling_masks-FREEZE_ME"] for kind in ("channel", "spatial")]
    channel, spatial = (tables.is_split(mask) for mask in masks)
    if wrong := np.flatnonzero(channel == spatial).tolist():
        raise UsageError(
            f"{path}: the couplings {wrong} have split matrices of both kinds or of none; expected "
            "exactly one that is not zero; check that the checkpoint is of this model"
        )
    there = ["spatial" if is_spatial else "channels" for is_spatial in spatial]
    if there != [kinds[layer % len(kinds)] for layer in range(len(there))]:
        raise UsageError(
            f"kinds is {tuple(kinds)}, but the couplings of {path} are {', '.join(there)}; "
            "set it to their cycle"
        )


def _published(
    path: Path,
    table: Table,
    tensors: Tensors,
    section: dict[str, Any],
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> Published:
    published = Published(section, image_shape, num_classes, {})
    wanted = abstract_variables(published.flow)
    try:
        return published._replace(variables=from_published(table, tensors, wanted))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
