"""Sampling: prior noise through the inverse, with guidance and denoising."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8, UInt32

from jetflow import likelihood, sharding
from jetflow.flows.stack import check_labels
from jetflow.noise import Purpose, keys_by_example
from jetflow.sampling.decoding import check_decoding, check_guidance, check_guided, decodings
from jetflow.sampling.denoise import Denoising, check_denoising, denoised_along
from jetflow.types import AnyArray, Decoding, Flow, Guidance, UsageError, is_arrays

# Of XLA. By default it may keep more bits of a bfloat16 value than there are, in one program other
# ones than in the next; then an image encoded and decoded again by a bfloat16 net is off by pixels.
AS_WRITTEN = {"xla_allow_excess_precision": False}


class Drawn(NamedTuple):
    """A batch of images.

    Attributes:
        pixels: pixel values as the flow gives them, unrounded and unclipped; on the host.
        sweeps: evaluations of each block's net, in the order of the blocks; empty for a Jet.
        residual: the largest change of a guess that was taken for right, as the tolerance of a
            `Decoding` measures it.
        latents: what they were decoded from; None where that is known.
    """

    pixels: Float[np.ndarray, "B *X"]
    sweeps: tuple[int, ...] = ()
    residual: float = 0.0
    latents: Float[np.ndarray, "B T D"] | None = None

    @property
    def finite(self) -> Bool[np.ndarray, "B"]:
        """Which images have finite values alone. The others are shown in black, never redrawn."""
        return np.asarray(np.isfinite(self.pixels).reshape(len(self.pixels), -1).all(axis=1))

    def images(self, noise: str) -> Num[np.ndarray, "B *X"]:
        """The images as files have them, uint8, broken ones black; arrays as they are.

        Args:
            noise: the kind of noise that the flow was trained with, see `quantise`.
        """
        if is_arrays(self.pixels.shape[1:]):
            return self.pixels.astype(np.float32)
        return quantise(np.where(self.finite[:, None, None, None], self.pixels, 0), noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A flow and how images are drawn from it.

    Attributes:
        flow, variables: the model.
        guidance: see `Guidance`; for flows with labels, or with a temperature other than 1.
        temperature: multiplies the standard deviation of the prior.
        denoise: after sampling; None for none.
        noise_level: the one that a noise-conditional flow is told; None for any other.
        decoding: of each block, for a TarFlow; default: token by token.
        mesh: devices over which batches are split; default: none are, and they are computed where
            the variables lie.

    Raises:
        UsageError: on guidance that cannot guide, or a number out of range.
    """

    flow: Flow
    variables: Any
    guidance: Guidance | None = None
    temperature: float = 1.0
    denoise: Denoising | None = None
    decoding: tuple[Decoding, ...] | None = None
    mesh: Mesh | None = None
    noise_level: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "guidance", check_guidance(self.flow, self.guidance))
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; expected 0 or more")
        check_denoising(self.flow, self.denoise)
        check_decoding(self.flow, self.decoding)

    def draw(
        self, key: Key[Array, ""], index: Int[AnyArray, "B"], label: Int[AnyArray, "B"] | None
    ) -> Drawn:
        """The images of these numbers: image i depends on the key, its label and i alone."""
        keys = None
        if self.denoise and self.denoise.eta:
            keys = keys_by_example(jax.random.fold_in(key, Purpose.DENOISE), jnp.asarray(index))
            keys = np.asarray(jax.random.key_data(keys))
        z = self.latents(key, index)
        return self.decode(z, label, keys)._replace(latents=z)

    def latents(self, key: Key[Array, ""], index: Int[AnyArray, "B"]) -> Float[np.ndarray, "B T D"]:
        """Noise of the prior for the images of these numbers, on the host."""
        with sharding.on(self.mesh):
            z = _latents(self.flow, self.variables, key, self.place(index), self.temperature)
        return gather(z)[: len(index)]

    def decode(
        self,
        z: Float[AnyArray, "B T D"],
        label: Int[AnyArray, "B"] | None,
        keys: UInt32[np.ndarray, "B K"] | None = None,
    ) -> Drawn:
        """The images of latents.

        Args:
            keys: data of the keys of each image, for denoising that draws noise.
        """
        if keys is None and self.denoise and self.denoise.eta:
            raise UsageError("denoise_eta draws noise, and these images have no seed; set it to 0")
        with sharding.on(self.mesh):
            decoded = _decode(*self._inputs(*map(self.place, (z, label, keys))), **self._static)
        x, sweeps, residuals = gather(decoded)
        sweeps = tuple(sweeps.tolist()) if self.flow.decoded_blocks else ()
        return Drawn(x[: len(z)], sweeps, float(residuals.max()))

    def place(self, array: AnyArray | None) -> Array | None:
        """A batch split over the mesh, its last row repeated to fill all parts."""
        if self.mesh is None or array is None:
            return None if array is None else jnp.asarray(array)
        missing = -len(array) % sharding.batch_parts(self.mesh)
        if missing:
            array = np.concatenate([array, *[np.asarray(array[-1:])] * missing])
        return jax.device_put(array, sharding.batch_sharding(self.mesh))

    def lower(self, z: Any, label: Any) -> Lowered:
        """The program of `decode`, before it is compiled; for arrays, or their shapes alone."""
        with sharding.on(self.mesh):
            return _decode.lower(*self._inputs(z, label, None), **self._static)

    def _inputs(self, z, label, keys):
        return (
            self.flow, self.variables, z, label, keys, self.noise_level, self.guidance,
            self.denoise and np.asarray(self.denoise.levels),
            self.denoise and self.denoise.eta, self.decoding,
        )  # fmt: skip

    @property
    def _static(self) -> dict[str, bool]:
        return {"clip": bool(self.denoise and self.denoise.clip)}


def gather(tree: Any) -> Any:
    """Arrays that lie on a mesh, whole, on the host of each process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def draw_all(
    sampler: Sampler,
    key: Key[Array, ""],
    *,
    num: int,
    label: int | Int[AnyArray, "N"] | None = None,
    batch_size: int = 64,
    start: int = 0,
) -> Iterator[Drawn]:
    """The images start, …, num − 1 in batches, all of one size, so that one program serves them.

    Of the last, what is too much is cut off.
    """
    for name, value in (("num", num), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    labels = check_labels(sampler.flow, label, num)
    check_guided(sampler.guidance, labels)
    batch_size = min(batch_size, num)
    for first in range(start, num, batch_size):
        index = np.arange(first, first + batch_size)
        part = None if labels is None else labels[np.minimum(index, num - 1)]
        drawn = sampler.draw(key, index, part)
        assert drawn.latents is not None
        yield drawn._replace(
            pixels=drawn.pixels[: num - first], latents=drawn.latents[: num - first]
        )


def sample(
    flow: Flow,
    variables,
    key: Key[Array, ""],
    *,
    num: int,
    label: int | Int[AnyArray, "N"] | None = None,
    guidance: Guidance | None = None,
    temperature: float = 1.0,
    denoise: float | Denoising | None = None,
    noise_level: float | None = None,
    noise: str = "uniform",
    method: str | Sequence[Decoding] = "cached",
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Num[np.ndarray, "N *X"]:
    """`num` images, uint8 [N, H, W, C], or arrays, float32 [N, T, D].

    Args:
        key: image i depends on the key and on i alone, not on `num`, `batch_size` or `mesh`.
        label: one class for all images, or one an image; None or -1 for no label.
        guidance, temperature, noise_level, mesh: see `Sampler`.
        denoise: σ of one denoising step, as training with gaussian noise asks for; or a
            `Denoising`.
        noise: the kind of noise that the flow was trained with: values of a dequantised pixel
            lie above it, those of a noisy one around it.
        method: how a TarFlow is inverted: "cached", token by token; "jacobi", by windows of
            tokens, see `Decoding`; or the `Decoding` of each block.

    Raises:
        UsageError: on a label out of range, guidance that cannot guide, or an unknown method.

    Warns if some of the images are not finite.
    """
    how = decodings(flow, method) if isinstance(method, str) else tuple(method)
    if isinstance(denoise, float | int):
        denoise = Denoising((denoise,)) if denoise else None
    sampler = Sampler(flow, variables, guidance, temperature, denoise, how, mesh, noise_level)
    batches = [*draw_all(sampler, key, num=num, label=label, batch_size=batch_size)]
    if complaint := not_finite(np.concatenate([drawn.finite for drawn in batches])):
        warnings.warn(complaint, RuntimeWarning, stacklevel=2)
    return np.concatenate([drawn.images(noise) for drawn in batches])


def not_finite(finite: Bool[np.ndarray, "N"]) -> str:
    """What to tell a person of images that are not finite; nothing where all are."""
    broken = int((~finite).sum())
    return f"{broken} of {len(finite)} images are not finite, and black" if broken else ""


@functools.partial(jax.jit, static_argnames="flow")
def _latents(flow, variables, key, index, temperature) -> Float[Array, "B T D"]:
    keys = keys_by_example(key, index)
    z = jax.vmap(lambda key: jax.random.normal(key, flow.latent_shape))(keys)
    return z * temperature * jnp.sqrt(likelihood.prior_variance(variables))


@functools.partial(jax.jit, static_argnames=("flow", "clip"), compiler_options=AS_WRITTEN)
def _decode(flow, variables, z, label, keys, noise_level, guidance, levels, eta, decoding, *, clip):
    """Pixels [B, H, W, C], and sweeps and residual of each block."""
    x, _, _, sweeps, residuals = flow.apply(
        variables, z, label, guidance, decoding, noise_level, method="inverse_blocks"
    )
    if levels is not None:
        x = denoised_along(flow, variables, x, label, levels, keys, clip=clip, eta=eta)
    return x, sweeps, residuals


def quantise(pixels: Float[np.ndarray, "... H W C"], noise: str) -> UInt8[np.ndarray, "... H W C"]:
    """Pixel values to uint8: down after uniform dequantisation, else to the nearest."""
    whole = np.floor(pixels) if noise == "uniform" else np.rint(pixels)
    return np.nan_to_num(np.clip(whole, 0, 255)).astype(np.uint8)
