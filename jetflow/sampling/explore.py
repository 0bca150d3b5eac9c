"""Looking into a flow: latents of images, paths between them, and the image block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jetflow import sharding
from jetflow.sampling.ancestral import AS_WRITTEN, Sampler, gather
from jetflow.types import AnyArray


def encode(
    sampler: Sampler,
    images: UInt8[np.ndarray, "B H W C"],
    label: Int[AnyArray, "B"] | None,
    noise: str,
) -> Float[np.ndarray, "B T D"]:
    """The latents of images, without a draw of the noise, on the host.

    Args:
        noise: the kind of noise that the flow was trained with; of a dequantised pixel value v, the
            middle v + 1/2 is encoded.
    """
    x, placed = sampler.place(images + centre(noise)), sampler.place(label)
    with sharding.on(sampler.mesh):
        z = _encode(sampler.flow, sampler.variables, x, placed)
    return gather(z)[: len(images)]


def centre(noise: str) -> np.float32:
    """Where the noise of training centres, above a pixel value."""
    return np.float32(0.5 if noise == "uniform" else 0.0)


@functools.partial(jax.jit, static_argnames="flow", compiler_options=AS_WRITTEN)
def _encode(flow, variables, x, label):
    return flow.apply(variables, x, label, method="forward")[0]


def interpolate(
    first: Float[AnyArray, "T D"], last: Float[AnyArray, "T D"], num: int
) -> Float[Array, "{num} T D"]:
    """`num` latents from the first to the last, both included, on a great circle.

    Spherical interpolation keeps the norm between those of the ends, where a gaussian of many
    dimensions has its mass; on a straight line it would shrink towards the middle.
    """
    share = jnp.linspace(0.0, 1.0, num)[:, None, None]
    cosine = jnp.vdot(first, last) / (jnp.linalg.norm(first) * jnp.linalg.norm(last))
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    on_circle = jnp.sin((1 - share) * angle) * first + jnp.sin(share * angle) * last
    straight = (1 - share) * first + share * last
    nearly_parallel = ~(jnp.sin(angle) >= 1e-4)  # or one of them is zero, and has no direction
    return jnp.where(
        nearly_parallel, straight, on_circle / jnp.where(nearly_parallel, 1.0, jnp.sin(angle))
    )


def trace(
    sampler: Sampler, z: Float[AnyArray, "B T D"], label: Int[AnyArray, "B"] | None
) -> Float[np.ndarray, "S B H W C"]:
    """The image at each stage: the latents, then after each block's inverse, in order of sampling,
    and last, where the sampler denoises, the denoised image.

    The stages of a Jet are its couplings.
    """
    placed = sampler.place(z), sampler.place(label)
    with sharding.on(sampler.mesh):
        tokens = _stages(
            sampler.flow, sampler.variables, *placed, sampler.guidance, sampler.decoding
        )
    stages = np.asarray(sampler.flow.as_image(jnp.asarray(gather(tokens)[:, : len(z)])))
    if not sampler.denoise:
        return stages
    return np.concatenate([stages, sampler.decode(z, label).pixels[None]])


@functools.partial(jax.jit, static_argnames="flow", compiler_options=AS_WRITTEN)
def _stages(flow, variables, z, label, guidance, decoding) -> Float[Array, "S B T D"]:
    blocks = flow.apply(variables, z, label, guidance, decoding, method="inverse_blocks")
    return jnp.concatenate([z[None], blocks.tokens])
