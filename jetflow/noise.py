"""The random parts of training: dequantisation, gaussian augmentation, label drop, flips.

Every draw is keyed by (seed, step, purpose) and made on the global array, so that it does not
depend on the mesh or the number of hosts. Evaluation keys its draws by example instead.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from jetflow.types import NO_LABEL, UsageError

LARGEST_SEED = 2**32 - 1  # keys are made of 32 bits


class Purpose(enum.IntEnum):
    """What a key is for; part of the key, so the numbers never change."""

    INIT = 0
    PIXELS = 1
    FLIP = 2
    LABEL_DROP = 3
    SAMPLE = 4
    EVALUATE = 5


def key_for(seed: int, step: Int[Array, ""] | int, purpose: Purpose) -> Key[Array, ""]:
    """The key of (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def keys_by_example(key: Key[Array, ""], index: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key an example: its draw depends on its index and on nothing else of the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


@dataclasses.dataclass(frozen=True)
class Noise:
    """What training does to an image and its label.

    Attributes:
        kind: "uniform" adds U[0, 1) to every pixel value (dequantisation); "gaussian" adds
            std·N(0, 1).
        std: of the gaussian noise, in [-1, 1] units: of the range that the flow rescales pixels to.
        label_drop: probability that an example's label is replaced by `NO_LABEL`.
        flip: mirror an image left to right with probability 1/2.
    """

    kind: str = "uniform"
    std: float = 0.0
    label_drop: float = 0.0
    flip: bool = False

    def __post_init__(self):
        if self.kind not in ("uniform", "gaussian"):
            raise UsageError(f"config.noise.kind is {self.kind!r}; expected uniform or gaussian")
        if (self.kind == "gaussian") != (self.std > 0):
            raise UsageError(
                f"config.noise.std is {self.std} with {self.kind} noise; gaussian noise needs a "
                "value above 0, uniform noise 0"
            )
        if not 0 <= self.label_drop < 1:
            raise UsageError(f"config.noise.label_drop is {self.label_drop}; expected 0 <= p < 1")

    def add(
        self, image: UInt8[Array, "*B H W C"], key: Key[Array, ""], pixel_scale: float
    ) -> Float[Array, "*B H W C"]:
        """Noisy pixel values, in pixel units."""
        if self.kind == "uniform":
            return image + jax.random.uniform(key, image.shape)
        return image + self.std * pixel_scale * jax.random.normal(key, image.shape)

    def add_by_example(
        self, image: UInt8[Array, "B H W C"], keys: Key[Array, "B"], pixel_scale: float
    ) -> Float[Array, "B H W C"]:
        """`add` with a key for each example."""
        return jax.vmap(lambda one, key: self.add(one, key, pixel_scale))(image, keys)

    def augment(
        self,
        image: UInt8[Array, "B H W C"],
        label: Int[Array, "B"],
        *,
        seed: int,
        step: Int[Array, ""],
        pixel_scale: float,
    ) -> tuple[Float[Array, "B H W C"], Int[Array, "B"]]:
        """The training input of `step`: noisy pixel values, and labels with some dropped."""
        if self.flip:
            mirrored = jax.random.bernoulli(key_for(seed, step, Purpose.FLIP), 0.5, label.shape)
            image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
        if self.label_drop:
            key = key_for(seed, step, Purpose.LABEL_DROP)
            dropped = jax.random.bernoulli(key, self.label_drop, label.shape)
            label = jnp.where(dropped, NO_LABEL, label)
        return self.add(image, key_for(seed, step, Purpose.PIXELS), pixel_scale), label
