"""A flow: preprocessing, then a chain of blocks."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jetflow.flows import affine
from jetflow.flows.pixels import Arrays, Pixels
from jetflow.nn.attention import Choice, choose
from jetflow.types import (
    BlockInputs,
    BlockOutputs,
    Condition,
    Decoding,
    Flow,
    Guidance,
    Shape,
    UsageError,
)


class Stack(nn.Module):
    """The `Flow` that both models are: `Pixels` or `Arrays`, and blocks.

    Attributes:
        pixels: the preprocessing.
        blocks: modules with `forward_blocks(x, condition)`,
            `inverse_blocks(z, condition, guidance, decoding)` and their `net`.
        num_classes: 0 for a flow without labels.
        learned_prior: keep the prior variance of each latent dimension in the collection
            `prior`, as the mean square of the latents; else the prior is standard normal.
        precision: of all products, as `jax.default_matmul_precision` takes it; None for as it is.
        noise_conditional: whether the blocks are told the noise level.
    """

    pixels: Pixels | Arrays
    blocks: tuple[nn.Module, ...]
    num_classes: int = 0
    learned_prior: bool = False
    precision: str | None = None
    noise_conditional: bool = False

    def setup(self):
        if self.learned_prior:
            self.variable("prior", "variance", jnp.ones, self.latent_shape)

    @property
    def image_shape(self) -> Shape:
        return self.pixels.image_shape

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.pixels.token_shape

    @property
    def pixel_scale(self) -> Any:
        return self.pixels.scale

    @property
    def pixel_logdet(self) -> float:
        return self.pixels.logdet

    @property
    def decoded_blocks(self) -> int:
        return len(self.blocks) if self.logdet_cap is None else 0

    @property
    def logdet_cap(self) -> float | None:
        caps = [getattr(block, "logdet_cap", math.inf) for block in self.blocks]
        return None if math.inf in caps else sum(caps)

    def attention_on(self, platform: str) -> Choice:
        """The form of attention that its nets take on a platform."""
        net = self.blocks[0].net
        if getattr(net, "net", "vit") == "conv":
            return Choice("none", "the nets convolve")
        return choose(
            net.attention,
            platform=platform,
            dtype=net.dtype,
            tokens=self.latent_shape[0],
            head_dim=net.width // net.num_heads,
            precision=self.precision or "default",
        )

    def as_image(self, tokens: Float[Array, "... T D"]) -> Float[Array, "..."]:
        x, _ = self.pixels.inverse(tokens.reshape(-1, *self.latent_shape))
        return x.reshape(*tokens.shape[:-2], *self.image_shape)

    def __call__(self, x, label=None, noise_level=None):
        return self.forward(x, label, noise_level)

    def forward(
        self,
        x: Float[Array, "B *X"],
        label: Int[Array, "B"] | None = None,
        noise_level: Float[Array, "*B"] | float | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B"]]:
        return self.forward_blocks(x, label, noise_level)[:2]

    def inverse(
        self,
        z: Float[Array, "B T D"],
        label: Int[Array, "B"] | None = None,
        guidance: Guidance | None = None,
        decoding: Sequence[Decoding] | None = None,
        noise_level: Float[Array, "*B"] | float | None = None,
    ) -> tuple[Float[Array, "B *X"], Float[Array, "B"]]:
        return self.inverse_blocks(z, label, guidance, decoding, noise_level)[:2]

    def forward_blocks(self, x, label=None, noise_level=None) -> BlockOutputs:
        if x.shape[1:] != self.image_shape:
            raise UsageError(
                f"inputs are {x.shape[1:]}; this flow was built for {self.image_shape}"
            )
        condition, blocks = self._condition(label, noise_level, len(x)), []
        x, total = self.pixels.forward(x)
        for block in self.blocks:
            with jax.default_matmul_precision(self.precision):
                blocks.append(block.forward_blocks(x, condition))
            x, total = blocks[-1].z, total + blocks[-1].logdet
        logdets, scales = zip(*[block[2:] for block in blocks], strict=True)
        return BlockOutputs(x, total, jnp.concatenate(logdets), jnp.concatenate(scales))

    def inverse_blocks(
        self, z, label=None, guidance=None, decoding=None, noise_level=None
    ) -> BlockInputs:
        condition = self._condition(label, noise_level, len(z))
        with jax.default_matmul_precision(self.precision):
            blocks = self._inverses(z, condition, guidance, decoding)
        x, logdet = self.pixels.inverse(blocks[-1].x)
        total = sum((block.logdet for block in blocks), jnp.zeros(z.shape[0]))
        tokens = jnp.concatenate([block.tokens for block in blocks])
        sweeps, residuals = zip(*[block[3:] for block in reversed(blocks)], strict=True)
        return BlockInputs(
            x, total + logdet, tokens, jnp.concatenate(sweeps), jnp.concatenate(residuals)
        )

    def _inverses(self, z, condition, guidance, decoding) -> list[BlockInputs]:
        """Of each block, the last first."""
        each = decoding or (None,) * len(self.blocks)
        alike: list[Any] = [None]
        if self.decoded_blocks:
            alike = [block.unbind()[0].clone(backward=False) for block in self.blocks]

        def kind(number: int) -> Any:
            is_guided = guidance_of(self, number, guidance) is not None
            return alike[number], jax.tree.structure(each[number]), is_guided

        inverses = []
        for (*_, is_guided), group in itertools.groupby(reversed(range(len(each))), kind):
            numbers, guiding = [*group], guidance if is_guided else None
            if len(numbers) > 1:
                hows = [each[number] for number in numbers]
                inverses += self._looped(numbers, z, condition, guiding, hows)
            else:
                block, how = self.blocks[numbers[0]], each[numbers[0]]
                inverses.append(block.inverse_blocks(z, condition, guiding, how))
            z = inverses[-1].x
        return inverses

    def _looped(self, numbers, z, condition, guidance, decoding) -> list[BlockInputs]:
        """The inverses of blocks that decode alike, compiled once, as the body of a loop."""
        blocks, variables = zip(*[self.blocks[n].unbind() for n in numbers], strict=True)
        backward = [block.backward for block in blocks]
        inputs = list(zip(backward, variables, decoding, strict=True))

        def inverse(x, inputs):
            backward, variables, how = inputs
            block = blocks[0].clone(backward=backward)
            inverse = block.apply(variables, x, condition, guidance, how, method="inverse_blocks")
            return inverse.x, inverse

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
        _, inverses = jax.lax.scan(inverse, affine.widen(z)[0], stacked)
        return [jax.tree.map(lambda a, i=i: a[i], inverses) for i in range(len(blocks))]

    def _condition(self, label, noise_level, batch: int) -> Condition:
        if (noise_level is None) == self.noise_conditional:
            verb = "needs" if self.noise_conditional else "takes no"
            raise UsageError(f"this flow {verb} noise_level, as it is built")
        if noise_level is not None:
            noise_level = jnp.broadcast_to(noise_level, (batch,))
        return Condition(label, noise_level)


def guidance_of(flow: Stack, block: int, guidance: Guidance | None) -> Guidance | None:
    """That of one block, for which guidance may leave it out; blocks are decoded from the last."""
    count = (guidance and guidance.blocks) or len(flow.blocks)
    return guidance if block >= len(flow.blocks) - count else None


def check_labels(flow: Flow, label, num: int) -> Int[Array, "N"] | None:
    """Labels as int32 [N], or None.

    Raises:
        UsageError: if the flow has no labels, or not this one, as far as its value is known: under
            `jax.jit` shape and type alone are.
    """
    if label is None:
        return None
    if not flow.num_classes:
        raise UsageError("label given, but this flow was trained without labels; leave it out")
    is_traced = isinstance(label, Tracer)
    labels = label if is_traced else np.asarray(label)
    if labels.shape not in ((), (num,)) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UsageError(
            f"label is {labels.dtype.name}{list(labels.shape)}; expected one integer, or {num}"
        )
    wrong = [] if is_traced else labels[(labels < -1) | (labels >= flow.num_classes)]
    if len(wrong):
        raise UsageError(
            f"label {wrong[0]} is out of range; expected 0 to {flow.num_classes - 1}, "
            "or -1 for no label"
        )
    return jnp.broadcast_to(jnp.asarray(labels, jnp.int32), (num,))
