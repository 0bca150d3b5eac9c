"""Latents of images, paths between them, and the image block by block."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jetflow import sharding
from jetflow.sampling.ancestral import AS_WRITTEN, Drawn, Sampler, gather
from jetflow.types import AnyArray, Batch


def encode(
    sampler: Sampler,
    images: Num[AnyArray, "N *X"],
    label: Int[AnyArray, "N"] | None,
    noise: str,
    batch_size: int = 64,
) -> tuple[Float[np.ndarray, "N T D"], Float[np.ndarray, "N"]]:
    """The latents of images, without a draw of the noise, and the log-determinants; on the host.

    Args:
        images: pixel values.
        noise: the kind of noise that the flow was trained with; of a dequantised pixel value v, the
            middle v + 1/2 is encoded.
    """
    parts = []
    for x, part_label in _parts(batch_size, images + centre(noise), label):
        placed = sampler.place(x), sampler.place(part_label)
        with sharding.on(sampler.mesh):
            encoded = _encode(sampler.flow, sampler.variables, *placed, sampler.noise_level)
            encoded = gather(encoded)
        parts.append([array[: len(x)] for array in encoded])
    z, logdet = map(np.concatenate, zip(*parts, strict=True))
    return z, logdet


def encode_batch(
    sampler: Sampler, batch: Batch, noise: str
) -> tuple[Float[Array, "B T D"], Float[Array, "B"]]:
    """`encode` of a batch that lies on the mesh, where its results stay."""
    label = batch.label if sampler.flow.num_classes else None
    x = batch.image + centre(noise)
    return _encode(sampler.flow, sampler.variables, x, label, sampler.noise_level)


def decode(
    sampler: Sampler,
    z: Float[AnyArray, "N T D"],
    label: Int[AnyArray, "N"] | None,
    batch_size: int = 64,
) -> Drawn:
    """The images of latents, so many at a time; it does not say what sweeps they took."""
    parts = [sampler.decode(*part).pixels for part in _parts(batch_size, z, label)]
    return Drawn(np.concatenate(parts))


def _parts(batch_size: int, *arrays: Any) -> Iterator[list[Any]]:
    """Arrays in parts of so many rows; the first is one, the others may be None."""
    for start in range(0, len(arrays[0]), batch_size):
        part = slice(start, start + batch_size)
        yield [None if array is None else array[part] for array in arrays]


def centre(noise: str) -> np.float32:
    """Where the noise of training centres, above a pixel value."""
    return np.float32(0.5 if noise == "uniform" else 0.0)


@functools.partial(jax.jit, static_argnames="flow", compiler_options=AS_WRITTEN)
def _encode(flow, variables, x, label, noise_level):
    return flow.apply(variables, x, label, noise_level, method="forward")


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
    sampler: Sampler,
    z: Float[AnyArray, "N T D"],
    label: Int[AnyArray, "N"] | None,
    batch_size: int = 64,
) -> Float[np.ndarray, "S N *X"]:
    """The image at each stage: the latents, then after each block's inverse, in order of sampling,
    and last, where the sampler denoises, the denoised image.

    The stages of a Jet are its couplings.
    """
    parts = []
    for latents, part_label in _parts(batch_size, z, label):
        placed = sampler.place(latents), sampler.place(part_label)
        with sharding.on(sampler.mesh):
            stages = _stages(
                sampler.flow, sampler.variables, *placed, sampler.guidance, sampler.decoding,
                sampler.noise_level,
            )  # fmt: skip
        tokens = jnp.asarray(gather(stages)[:, : len(latents)])
        last = [sampler.decode(latents, part_label).pixels[None]] if sampler.denoise else []
        parts.append(np.concatenate([sampler.flow.as_image(tokens), *last]))
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames="flow", compiler_options=AS_WRITTEN)
def _stages(flow, variables, z, *how) -> Float[Array, "S B T D"]:
    blocks = flow.apply(variables, z, *how, method="inverse_blocks")
    return jnp.concatenate([z[None], blocks.tokens])
