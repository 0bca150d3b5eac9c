"""What all modules share: the axes, a batch, the `Flow` protocol, guidance, bad input.

Axis glossary: B batch, H height, W width, C colour channels, T tokens (patches), D features of a
token (patch_size² · C), L layers; *X stands for H W C, or for T D of arrays that are no images.
Pixels are in pixel units, 0..256, arrays in units of their own; log-determinants and
log-likelihoods are in nats, summed over an example, and at least float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int

NO_LABEL = -1

Shape: TypeAlias = tuple[int, ...]
Standard: TypeAlias = Sequence[Sequence[float]]  # means and deviations of D features
AnyArray: TypeAlias = np.ndarray | Array
Config: TypeAlias = Any  # an ml_collections ConfigDict: sections of fields, as configs/base.py has


class UsageError(ValueError):
    """Bad input by the user: the message says what was expected, what came, and the remedy."""

    status = 2  # of the command


def is_arrays(shape: Shape) -> bool:
    """Whether this is the shape of arrays (T, D), and not of images (H, W, C)."""
    return len(shape) == 2


class Interruption(UsageError):
    """What befell a run, by no fault of its input: the same command goes on, and may succeed."""

    status = 1


class Batch(NamedTuple):
    """One global (or one host's part of a) batch, as the data pipeline makes it.

    Attributes:
        image: uint8 [B, H, W, C], or of arrays float32 [B, T, D].
        label: int32 [B]; `NO_LABEL` where there is none.
        index: int32 [B], the example's position in its split; -1 marks a padding row.
    """

    image: Any
    label: Any
    index: Any


GUIDANCE_RULES = ("log_scale", "scale", "starflow")


class Condition(NamedTuple):
    """What a flow is told beside the image.

    Attributes:
        label: of each image, -1 for none, or shares of the classes; None without labels.
        noise_level: of each image, in units where pixels span [-1, 1]; None for a flow that is not
            noise-conditional.
    """

    label: Int[Array, "B"] | Float[Array, "B Y"] | None = None
    noise_level: Float[Array, "B"] | None = None


@flax.struct.dataclass
class Guidance:
    """How a sampler pushes away from the unconditional prediction.

    With c the conditional and u the unconditional prediction, μ a shift and σ a scale:

    - log_scale: c + g·(c − u) of log σ and μ (TarFlow, arXiv 2412.06329);
    - scale: c + g·(c − u) of σ and μ (iTARFlow, arXiv 2604.20041);
    - starflow: with s = min(σc/σu, 1)² and d = 1 + g − g·s, σ = σc/√d and
      μ = ((1 + g)·μc − g·s·μu)/d (STARFlow, arXiv 2506.06276).

    Attributes:
        scale: the strength g; 0 is plain sampling.
        rule: of these three.
        what: which predictions are guided: "a" the log-scale, "b" the shift, "ab" both.
        temperature: τ, divides the attention logits of the unconditional pass only; with τ ≠ 1 the
            unconditional pass is worse than the conditional one even without labels.
        annealed: multiply g by j / (T − 1) at the j-th decoded token, j = 0 … T − 1.
        blocks: how many are guided, of those that are decoded first; 0 for all.
    """

    scale: Any = 0.0  # a float, but an array where a function of it is traced
    what: str = flax.struct.field(pytree_node=False, default="ab")
    temperature: Any = 1.0
    annealed: bool = flax.struct.field(pytree_node=False, default=False)
    rule: str = flax.struct.field(pytree_node=False, default="log_scale")
    blocks: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Decoding:
    """How a block of a TarFlow is inverted.

    Its tokens x are the fixed point of x = z·exp(α(x)) + μ(x), where token i depends on those
    before it alone. A sweep evaluates a window of tokens at once, from guesses of those before.

    Attributes:
        window: tokens a sweep; 1 decodes token by token.
        tolerance: a token is accepted when a sweep changes those before it by at most this, in
            units of the block's tokens, or by that share of a value above 1; 0 gives what token
            by token gives, to rounding.
        cache_dtype: of cached keys and values, "bfloat16" say; None for that of the net.
    """

    window: int = flax.struct.field(pytree_node=False, default=1)
    tolerance: Any = 0.0  # a float, but an array where a function of it is traced
    cache_dtype: str | None = flax.struct.field(pytree_node=False, default=None)


class BlockOutputs(NamedTuple):
    """The forward pass of K blocks, where each coupling of a Jet is one.

    Attributes:
        z, logdet: as `forward` returns them.
        block_logdets: of each block, in nats, in the order of the blocks.
        block_scales: the root mean square of what each block puts out.
    """

    z: Float[Array, "B T D"]
    logdet: Float[Array, "B"]
    block_logdets: Float[Array, "K B"]
    block_scales: Float[Array, "K"]


class BlockInputs(NamedTuple):
    """The inverse of K blocks, where each coupling of a Jet is one.

    Attributes:
        x, logdet: as `inverse` returns them.
        tokens: what each block's inverse puts out, in the order of sampling: the last block first.
        sweeps: evaluations of each block's net, in the order of the blocks.
        residuals: of each block, the largest change of a guess that was accepted, as the tolerance
            of a `Decoding` measures it.
    """

    x: Array  # [B, H, W, C], or the tokens [B, T, D] of a block alone
    logdet: Float[Array, "B"]
    tokens: Float[Array, "K B T D"]
    sweeps: Int[Array, "K"]
    residuals: Float[Array, "K"]


@runtime_checkable
class Flow(Protocol):
    """An invertible map between images in pixel units and latent tokens, a Flax linen module.

    Preprocessing (rescaling, patches) is part of the map, and so of its log-determinant. The map is
    called by `apply` with the name of a method:

        z, logdet = flow.apply(variables, x, label, method="forward")
        x, logdet = flow.apply(variables, z, label, guidance, decoding, method="inverse")

    and with `noise_level=t` besides where it is noise-conditional. Images x are [B, H, W, C],
    latents z [B, T, D], log-determinants [B] of the map itself, label [B] or None, and t [B] in
    units where pixels span [-1, 1]. `guidance` and `decoding`, one of each block, default to None:
    plain sampling, token by token. "forward_blocks" and "inverse_blocks" return `BlockOutputs` and
    `BlockInputs`.

    Attributes:
        num_classes: 0 for a flow without labels.
        noise_conditional: whether it is one flow for all noise levels, and takes one.
        image_shape: (H, W, C), or of arrays (T, D).
        latent_shape: (T, D).
        pixel_scale: pixel values per unit of what the blocks see; of arrays, of each feature.
        pixel_logdet: the log-determinant of the preprocessing, in nats.
        logdet_cap: the least upper bound of the blocks' log-det, in nats; None for a TarFlow.
        decoded_blocks: blocks that are decoded token by token, and so take guidance and a
            `Decoding`; 0 for a flow that is inverted in one pass.
        attention_on: the form of attention on a platform, and why it is not a fused one.
        as_image: the preprocessing's inverse, of tokens [..., T, D]: the image that they show.
    """

    num_classes: int
    noise_conditional: bool

    @property
    def image_shape(self) -> Shape: ...
    @property
    def latent_shape(self) -> tuple[int, int]: ...
    @property
    def pixel_scale(self) -> Any: ...
    @property
    def pixel_logdet(self) -> float: ...
    @property
    def logdet_cap(self) -> float | None: ...
    @property
    def decoded_blocks(self) -> int: ...

    def attention_on(self, platform: str) -> Any: ...
    def as_image(self, tokens: Float[Array, "... T D"]) -> Float[Array, "..."]: ...
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...
