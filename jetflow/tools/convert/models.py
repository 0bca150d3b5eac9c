"""Published checkpoints as jetflow's flows and variables, and those of TarFlows back."""

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.build import build
from jetflow.flows.pixels import Pixels
from jetflow.flows.stack import Stack
from jetflow.options import Options, option
from jetflow.pth import read_pth, write_pth
from jetflow.tools.convert import big_vision, tables
from jetflow.tools.convert.mapping import Tensors, Variables, from_published, to_published
from jetflow.training.step import abstract_variables
from jetflow.types import Flow, UsageError

_NAMES = {False: "tarflow", True: "itarflow"}  # of the repositories, ml-…
HEAD_DIM = 64  # of every published TarFlow, whose files do not say it
GAUSSIAN_SCALE, UNIFORM_SCALE = 127.5, 128.0  # pixel scales, by the noise of the training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarflowSizes(Options):
    """What the tensors of a TarFlow do not say."""

    image_size: int = option(help="height and width in pixels", least=1, example="64")
    channels: int = option(help="of the image", least=1, example="3")
    patch_size: int = option(help="in pixels", least=1, example="2")
    pixel_scale: float | None = option(
        None,
        "pixels v enter as v / pixel_scale - 1; default: as published, 127.5 with gaussian noise, "
        "128 with uniform noise",
        least=1.0,
    )
    head_dim: int = option(HEAD_DIM, "features of an attention head", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JetSizes(Options):
    """What the tensors of a Jet do not say."""

    image_shape: tuple[int, ...] = option(help="height,width,channels", least=1, example="64,64,3")
    patch_size: int = option(help="in pixels", least=1, example="4")
    num_heads: int = option(help="attention heads", least=1, example="8")
    kinds: tuple[str, ...] = option(
        help="the cycle of the splits",
        choices=("channels", "spatial"),
        example="channels,channels,channels,channels,spatial",
    )
    scale_factor: float = option(2.0, "bound on a coupling's scale", least=0.01)

    def __post_init__(self):
        super().__post_init__()
        if len(self.image_shape) != 3:
            raise UsageError(
                f"image_shape is {self.image_shape}; expected (height, width, channels)"
            )


class Published(NamedTuple):
    """A published model: the config section that makes its flow, the flow, and its variables."""

    section: dict[str, Any]
    flow: Stack
    variables: Variables


def tarflow(path: str | os.PathLike, **sizes: Any) -> tuple[Stack, Variables]:
    """The flow and variables of a state dict of apple/ml-tarflow.

    The file does not tell the noise of its training: give `pixel_scale=128` for the one published
    model with uniform noise.

    Args:
        path: a .pth file, in PyTorch's zip or legacy format.
        sizes: of `TarflowSizes`, such as image_size=64, channels=3, patch_size=2.

    Raises:
        UsageError: if the file cannot be read, or its tensors are not of such a model.
    """
    return read_tarflow(path, TarflowSizes(**sizes))[1:]


def itarflow(path: str | os.PathLike, **sizes: Any) -> tuple[Stack, Variables]:
    """The noise-conditional flow and variables of a state dict of apple/ml-itarflow.

    Args and raises as `tarflow`.
    """
    return read_tarflow(path, TarflowSizes(**sizes), noise_conditional=True)[1:]


def jet(path: str | os.PathLike, **sizes: Any) -> tuple[Stack, Variables]:
    """The flow and variables of a Jet of google-research/big_vision.

    Args:
        path: an .npz with or without the prefix `params/`, a `checkpoint.bv-…` folder, or a workdir
            with the pointer `checkpoint.bv-LAST`.
        sizes: of `JetSizes`, such as image_shape=(64, 64, 3), patch_size=4, num_heads=8,
            kinds=("channels",) * 4 + ("spatial",), scale_factor=2.0.

    Raises:
        UsageError: if the checkpoint cannot be read, or its tensors are not of such a model.
    """
    return read_jet(path, JetSizes(**sizes))[1:]


def read_tarflow(
    path: str | os.PathLike, sizes: TarflowSizes, *, noise_conditional: bool = False
) -> Published:
    """The model of a state dict of apple/ml-tarflow, or with `noise_conditional` of ml-itarflow.

    Blocks, depths, width, classes and the volume-preserving variant are read off the tensors. The
    published sampler takes the label -1 for the index of its last class; here it means no label
    (the mean over the class embeddings) in sampling as it does in training.
    """
    tensors = read_pth(path)
    other = f"blocks.0.{tables.LAYERS[not noise_conditional]}."
    if any(name.startswith(other) for name in tensors):
        name = _NAMES[not noise_conditional]
        raise UsageError(f"{path} is of apple/ml-{name}; convert it with `jetflow convert {name}`")
    width, features = _shape(path, tensors, "blocks.0.proj_in.weight", 2)
    tokens, _ = _shape(path, tensors, "blocks.0.pos_embed", 2)
    outputs, _ = _shape(path, tensors, "blocks.0.proj_out.weight", 2)
    classes = "blocks.0.class_embed"
    num_classes = _shape(path, tensors, classes, 3)[0] if classes in tensors else 0
    blocks = _count(tensors, "blocks.")
    layers = tables.LAYERS[noise_conditional]
    depths = [_count(tensors, f"blocks.{block}.{layers}.") for block in range(blocks)]
    section = {
        "kind": "tarflow",
        "patch_size": sizes.patch_size,
        "width": width,
        "num_blocks": blocks,
        "layers_per_block": tuple(depths),
        "head_dim": sizes.head_dim,
        "volume_preserving": outputs == features,
        "noise_conditional": noise_conditional,
        "pixel_scale": sizes.pixel_scale or GAUSSIAN_SCALE,
    }
    image_shape = (sizes.image_size, sizes.image_size, sizes.channels)
    _check_patches(image_shape, sizes.patch_size, (tokens, features))
    flow = build(section, image_shape=image_shape, num_classes=num_classes)
    table = tables.tarflow(depths, noise_conditional)
    variables = from_published(path, table, tensors, abstract_variables(flow))
    return Published(section, flow, variables)


def read_jet(path: str | os.PathLike, sizes: JetSizes) -> Published:
    """The model of a Jet checkpoint of google-research/big_vision.

    Couplings, their depth and width are read off the tensors, and so are the splits.
    """
    tensors = big_vision.read(path)
    couplings, half, width = _shape(path, tensors, "couplings/dnn/init_proj/kernel", 3)
    _, _, tokens, _ = _shape(path, tensors, "couplings/dnn/posemb", 4)
    query = "couplings/dnn/vit/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    heads = _shape(path, tensors, query, 4)[2]
    height, image_width, channels = sizes.image_shape
    image_shape = (height, image_width, channels)
    _check_patches(image_shape, sizes.patch_size, (tokens, 2 * half))
    if sizes.num_heads != heads:
        raise UsageError(f"num_heads is {sizes.num_heads}, but {path} has {heads}; set it to that")
    section = {
        "kind": "jet",
        "patch_size": sizes.patch_size,
        "width": width,
        "num_heads": heads,
        "num_couplings": couplings,
        "block_depth": _count(tensors, "couplings/dnn/vit/encoderblock_"),
        "kinds": tuple(sizes.kinds),
        "scale_factor": sizes.scale_factor,
    }
    flow = build(section, image_shape=image_shape)
    table = tables.jet(heads, width, section["block_depth"])
    variables = from_published(path, table, tensors, abstract_variables(flow))
    _check_kinds(path, tensors, sizes.kinds)
    return Published(section, flow, variables)


def to_tarflow(path: str | os.PathLike, flow: Flow, variables: Variables) -> None:
    """Write a TarFlow as a state dict, which `torch.load` reads.

    It is one of apple/ml-tarflow, or where the flow is noise-conditional of apple/ml-itarflow.

    Raises:
        UsageError: if the flow is no TarFlow, or one that the published code would read as another.
    """
    blocks = flow.blocks if isinstance(flow, Stack) else ()
    if not blocks or not all(isinstance(block, AutoregressiveBlock) for block in blocks):
        raise UsageError("only a TarFlow can be written as a .pth; give the workdir of a TarFlow")
    nets = [block.transformer for block in blocks]  # type: ignore[attr-defined]
    for head_dim in {net.width // net.num_heads for net in nets} - {HEAD_DIM}:
        raise UsageError(
            f"config.flow.head_dim is {head_dim}, but the published code divides every width into "
            f"heads of {HEAD_DIM} and would read another model; train with head_dim {HEAD_DIM}"
        )
    table = tables.tarflow([net.num_layers for net in nets], flow.noise_conditional)
    tensors = to_published(table, variables)
    tokens, _ = flow.latent_shape
    for block in range(len(blocks)):
        tensors[f"blocks.{block}.attn_mask"] = np.tril(np.ones((tokens, tokens), np.float32))
    tensors.setdefault("var", np.ones(flow.latent_shape, np.float32))
    write_pth(path, tensors)


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


def _check_patches(
    image_shape: tuple[int, int, int], patch_size: int, stored: tuple[int, int]
) -> None:
    """Raise unless an image makes the (tokens, features) that the checkpoint has."""
    tokens, features = Pixels(image_shape, patch_size, 1.0, "hwc").token_shape
    if (tokens, features) != stored:
        raise UsageError(
            f"images of {image_shape} and patch_size {patch_size} make {tokens} patches of "
            f"{features} features, but the checkpoint has {stored[0]} of {stored[1]}; correct them"
        )


def _count(tensors: Tensors, prefix: str) -> int:
    """How many parts the names have that begin with `prefix` and a number: 0, 1, 2, … to a gap."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)[./]")
    numbers = {match[1] for name in tensors if (match := pattern.match(name))}
    return max(1, next(n for n in itertools.count() if str(n) not in numbers))
