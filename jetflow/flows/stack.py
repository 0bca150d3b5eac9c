"""A flow: preprocessing, then a chain of blocks."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jetflow.flows.pixels import Pixels
from jetflow.types import BlockInputs, BlockOutputs, Decoding, Guidance, UsageError


class Stack(nn.Module):
    """The `Flow` that both models are: `Pixels` and blocks, each with `forward` and `inverse`.

    Attributes:
        pixels: the preprocessing.
        blocks: modules with `forward(x, label)` and `inverse(z, label, guidance, decoding)`.
        num_classes: 0 for a flow without labels.
        learned_prior: keep the prior variance of each latent dimension in the collection
            `prior`, as the mean square of the latents; else the prior is standard normal.
    """

    pixels: Pixels
    blocks: tuple[nn.Module, ...]
    num_classes: int = 0
    learned_prior: bool = False

    def setup(self):
        if self.learned_prior:
            self.variable("prior", "variance", jnp.ones, self.pixels.token_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.pixels.image_shape

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(T, D)."""
        return self.pixels.token_shape

    @property
    def pixel_scale(self) -> float:
        return self.pixels.scale

    @property
    def pixel_logdet(self) -> float:
        """In nats, the same for every image."""
        return self.pixels.logdet

    @property
    def decoded_blocks(self) -> int:
        """Blocks that take guidance and a `Decoding`: those of a TarFlow."""
        return len(self.blocks) if self.logdet_cap is None else 0

    @property
    def logdet_cap(self) -> float | None:
        """The blocks' least upper bound on an example's log-det, in nats; None for a TarFlow."""
        caps = [getattr(block, "logdet_cap", math.inf) for block in self.blocks]
        return None if math.inf in caps else sum(caps)

    def as_image(self, tokens: Float[Array, "... T D"]) -> Float[Array, "... H W C"]:
        """The pixel values of tokens."""
        x, _ = self.pixels.inverse(tokens.reshape(-1, *self.latent_shape))
        return x.reshape(*tokens.shape[:-2], *self.image_shape)

    def __call__(self, x, label=None):
        return self.forward(x, label)

    def forward(
        self, x: Float[Array, "B H W C"], label: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B"]]:
        """Image in pixel units to latent, and its log-determinant in nats."""
        return self.forward_blocks(x, label)[:2]

    def forward_blocks(
        self, x: Float[Array, "B H W C"], label: Int[Array, "B"] | None = None
    ) -> BlockOutputs:
        """`forward`, and what there is to know of each block."""
        if x.shape[1:] != self.image_shape:
            raise UsageError(
                f"images are {x.shape[1:]}; this flow was built for {self.image_shape}"
            )
        x, total = self.pixels.forward(x)
        of_each = []
        for block in self.blocks:
            x, logdet, *statistics = block.forward_blocks(x, label)
            total = total + logdet
            of_each.append(statistics)
        return BlockOutputs(x, total, *map(jnp.concatenate, zip(*of_each, strict=True)))

    def inverse(
        self,
        z: Float[Array, "B T D"],
        label: Int[Array, "B"] | None = None,
        guidance: Guidance | None = None,
        decoding: Sequence[Decoding] | None = None,
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B"]]:
        """Latent to image in pixel units, and the log-determinant of this map in nats."""
        return self.inverse_blocks(z, label, guidance, decoding)[:2]

    def inverse_blocks(
        self,
        z: Float[Array, "B T D"],
        label: Int[Array, "B"] | None = None,
        guidance: Guidance | None = None,
        decoding: Sequence[Decoding] | None = None,
    ) -> BlockInputs:
        """`inverse`, and what there is to know of each block."""
        total = jnp.zeros(z.shape[0])
        tokens, sweeps, residuals = [], [], []
        for block, how in zip(
            reversed(self.blocks), reversed(decoding or (None,) * len(self.blocks)), strict=True
        ):
            block_inputs = block.inverse_blocks(z, label, guidance, how)
            z, total = block_inputs.x, total + block_inputs.logdet
            tokens.append(block_inputs.tokens)
            sweeps.insert(0, block_inputs.sweeps)
            residuals.insert(0, block_inputs.residuals)
        x, logdet = self.pixels.inverse(z)
        return BlockInputs(x, total + logdet, *map(jnp.concatenate, (tokens, sweeps, residuals)))
