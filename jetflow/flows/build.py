"""A config section or its values to a flow."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.coupling import Coupling, Couplings
from jetflow.flows.pixels import Arrays, Pixels
from jetflow.flows.stack import Stack
from jetflow.nn.attention import METHODS
from jetflow.nn.causal import CausalTransformer
from jetflow.nn.encoder import Encoder
from jetflow.nn.transformer import REMAT_POLICIES
from jetflow.types import Shape, Standard, UsageError, is_arrays

NETS = ("vit", "conv")
PRECISIONS = ("default", "high", "highest")
DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float64")}


def jet(
    *,
    image_shape: Shape,
    num_classes: int,
    standard: Standard | None,
    patch_size: int,
    width: int,
    num_heads: int,
    num_couplings: int,
    block_depth: int,
    kinds: Sequence[str] = ("channels",) * 4 + ("spatial",),
    scale_factor: float = 2.0,
    noise_conditional: bool = False,
    net: str = "vit",
    dtype: str = "float32",
    precision: str = "default",
    attention: str = "auto",
    remat: str = "none",
    scan: bool = True,
) -> Stack:
    """Jet (arXiv 2412.15129): `num_couplings` couplings with nets of `block_depth` layers.

    With `net` "conv" the nets are convolutional, of as many parameters, for comparison. With
    `noise_conditional` they are told the noise level.
    """
    _divides("num_heads", num_heads, "width", width)
    pixels = _preprocessing(image_shape, patch_size, 127.5, "hwc", standard)
    _, features = pixels.token_shape
    encoder = Encoder(
        net=_one_of("net", net, NETS),
        grid=pixels.grid,
        width=width,
        num_layers=block_depth,
        num_heads=num_heads,
        out_features=features,
        num_classes=num_classes,
        dtype=_dtype(dtype),
        attention=_one_of("attention", attention, METHODS),
        remat=_one_of("remat", remat, tuple(REMAT_POLICIES)),
        scan=scan,
        noise_conditional=noise_conditional,
    )
    coupling = Coupling(encoder, scale_factor)
    couplings = Couplings(coupling, pixels.grid, features, num_couplings, tuple(kinds))
    return Stack(
        pixels, (couplings,), num_classes, precision=_precision(precision),
        noise_conditional=noise_conditional,
    )  # fmt: skip


def tarflow(
    *,
    image_shape: Shape,
    num_classes: int,
    standard: Standard | None,
    patch_size: int,
    width: int,
    num_blocks: int,
    layers_per_block: int | Sequence[int],
    head_dim: int = 64,
    volume_preserving: bool = False,
    noise_conditional: bool = False,
    pixel_scale: float = 128.0,
    dtype: str = "float32",
    precision: str = "default",
    attention: str = "auto",
    remat: str = "none",
    scan: bool = True,
) -> Stack:
    """TarFlow (arXiv 2412.06329): `num_blocks` autoregressive blocks in alternating direction.

    `layers_per_block` may give each block its own depth. With `noise_conditional` it is one flow
    for all noise levels (iTARFlow, arXiv 2604.20041). `pixel_scale` is 128 in the published
    model for uniformly dequantised images, 127.5 in those trained with gaussian noise.
    """
    _divides("head_dim", head_dim, "width", width)
    pixels = _preprocessing(image_shape, patch_size, pixel_scale, "chw", standard)
    net = functools.partial(
        CausalTransformer,
        width,
        num_heads=width // head_dim,
        dtype=_dtype(dtype),
        attention=_one_of("attention", attention, METHODS),
        remat=_one_of("remat", remat, tuple(REMAT_POLICIES)),
        scan=scan,
    )
    blocks = tuple(
        AutoregressiveBlock(
            net(num_layers=depth),
            pixels.token_shape,
            num_classes,
            backward=index % 2 == 1,
            volume_preserving=volume_preserving,
            noise_conditional=noise_conditional,
        )
        for index, depth in enumerate(_depths(layers_per_block, num_blocks))
    )
    return Stack(
        pixels, blocks, num_classes, volume_preserving, _precision(precision), noise_conditional
    )


FLOWS: dict[str, Callable[..., Stack]] = {"jet": jet, "tarflow": tarflow}


def build(
    config: Any, *, image_shape: Shape, num_classes: int = 0, standard: Standard | None = None
) -> Stack:
    """The flow of a config section: `kind`, and the keyword arguments of `jet` or `tarflow`.

    Args:
        config: a mapping, or an ml_collections section such as `config.flow`.
        image_shape: (height, width, channels), or of arrays (tokens, features).
        num_classes: 0 for a flow without labels.
        standard: of arrays, the mean and the standard deviation of each feature, by which the flow
            standardises them; default: 0 and 1.

    Raises:
        UsageError: on a key or a value that the flow does not have.
    """
    fields = dict(config)
    constructor = _one_of("kind", fields.pop("kind", None), FLOWS)
    known = _parameters(constructor)
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            kind = constructor.__name__
            raise UsageError(f"config.flow.{name} is no field of a {kind}; {remedy}")
    return constructor(
        image_shape=image_shape, num_classes=num_classes, standard=standard, **fields
    )


def _preprocessing(
    shape: Shape, patch_size: int, scale: float, order: str, standard: Standard | None
) -> Pixels | Arrays:
    if not is_arrays(shape):
        height, width, channels = shape
        return Pixels((height, width, channels), patch_size, scale, order)
    if patch_size != 1:
        raise UsageError(
            f"config.flow.patch_size is {patch_size}; arrays have no patches: set it to 1"
        )
    tokens, features = shape
    mean, deviation = standard or ((0.0,) * features, (1.0,) * features)
    return Arrays((tokens, features), tuple(mean), tuple(deviation))


def _depths(layers_per_block: int | Sequence[int], num_blocks: int) -> list[int]:
    """Layers of each block."""
    depths = [layers_per_block] if isinstance(layers_per_block, int) else list(layers_per_block)
    depths = depths * num_blocks if len(depths) == 1 else depths
    if len(depths) != num_blocks:
        raise UsageError(
            f"config.flow.layers_per_block has {len(depths)} entries for {num_blocks} blocks; "
            "give one number, or one a block"
        )
    if not all(isinstance(depth, int) and depth >= 1 for depth in depths):
        raise UsageError(
            f"config.flow.layers_per_block is {layers_per_block!r}; expected numbers above 0"
        )
    return depths


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config section of a flow with the values of the fields that it leaves out."""
    parameters = _parameters(_one_of("kind", config["kind"], FLOWS)).values()
    optional = {
        field.name: field.default for field in parameters if field.default is not field.empty
    }
    return dict(config) | {name: value for name, value in optional.items() if name not in config}


def _parameters(constructor: Callable[..., Stack]) -> dict[str, inspect.Parameter]:
    """The fields of a flow's config section, by name."""
    parameters = inspect.signature(constructor).parameters
    given = ("image_shape", "num_classes", "standard")
    return {name: parameter for name, parameter in parameters.items() if name not in given}


def _one_of(field: str, value: Any, choices: Collection[str]) -> Any:
    """The choice; of a mapping, what it stands for."""
    if value not in choices:
        raise UsageError(f"config.flow.{field} is {value!r}; expected one of {', '.join(choices)}")
    return choices[value] if isinstance(choices, Mapping) else value


def _dtype(name: str) -> jnp.dtype:
    dtype = _one_of("dtype", name, DTYPES)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UsageError(f"config.flow.dtype is {name!r}, which needs JAX_ENABLE_X64=1; set it")
    return dtype


def _precision(name: str) -> str | None:
    return None if _one_of("precision", name, PRECISIONS) == "default" else name


def _divides(field: str, value: int, other: str, whole: int) -> None:
    if value < 1 or whole % value:
        raise UsageError(
            f"config.flow.{other} {whole} is not divisible by {field} {value}; "
            f"set config.flow.{field} to a divisor of {whole}"
        )
