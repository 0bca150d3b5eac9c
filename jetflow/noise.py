"""The random parts of training: dequantisation, gaussian noise, label drop, flips.

Every draw is keyed by (seed, step, purpose) and made on the global array, so that it does not
depend on the mesh or the number of hosts. Evaluation keys its draws by example instead.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from jetflow.types import NO_LABEL, Condition, Shape, UsageError, is_arrays

NOISY = ("gaussian", "levels")  # whose likelihoods are of other data than the images
KINDS = ("uniform", *NOISY, "none")
LARGEST_SEED = 2**32 - 1  # keys are made of 32 bits


class Purpose(enum.IntEnum):
    """What a key is for; part of the key, so the numbers never change."""

    INIT = 0
    PIXELS = 1
    FLIP = 2
    LABEL_DROP = 3
    SAMPLE = 4
    EVALUATE = 5
    LEVEL = 6
    DENOISE = 7


def key_for(seed: int, step: Int[Array, ""] | int, purpose: Purpose) -> Key[Array, ""]:
    """The key of (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def keys_by_example(key: Key[Array, ""], index: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key an example: its draw depends on its index and on nothing else of the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# The density of a noise level t between t0 and t1, as its inverse at a share of the probability.
DISTRIBUTIONS: dict[str, Callable[[Any, float, float], Any]] = {
    "uniform": lambda share, t0, t1: t0 + share * (t1 - t0),
    "square": lambda share, t0, t1: jnp.sqrt(t0**2 + share * (t1**2 - t0**2)),
    "lognormal": lambda share, t0, t1: t0 * (t1 / t0) ** _truncated_normal(share),
}
# The weight of an image in the loss, by the level of its noise.
WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "t": lambda t: t,
    "t2": lambda t: t**2,
    "1": lambda t: jnp.ones_like(t),
}


@dataclasses.dataclass(frozen=True)
class Noise:
    """What training does to an image and its label.

    Attributes:
        kind: "uniform" adds U[0, 1) to every pixel value (dequantisation); "gaussian" adds
            std·N(0, 1); "levels" adds t·N(0, 1) with a level t of each image, which the flow is
            told (iTARFlow, arXiv 2604.20041); "none" adds nothing, and is for arrays.
        std: of the gaussian noise, in [-1, 1] units: of the range that the flow rescales pixels to;
            of arrays, in standard deviations of each feature.
        label_drop: probability that an example's label is replaced by `NO_LABEL`.
        flip: mirror an image left to right with probability 1/2.
        t0, t1: the least and the largest level, in [-1, 1] units. Of uniform noise, t0 is the level
            that a noise-conditional flow is told.
        distribution: of t: "uniform"; "square", t² is uniform; "lognormal", log t is normal, and
            log t0 and log t1 lie two standard deviations from its mean, where it is cut off.
        weight: of an image in the loss: "t", "t2", its square, or "1".
    """

    kind: str = "uniform"
    std: float = 0.0
    label_drop: float = 0.0
    flip: bool = False
    t0: float = 0.0
    t1: float = 0.0
    distribution: str = "uniform"
    weight: str = "t"

    def __post_init__(self):
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            raise UsageError(f"config.noise.kind is {self.kind!r}; expected one of {known}")
        if (self.kind == "gaussian") != (self.std > 0):
            raise UsageError(
                f"config.noise.std is {self.std} with {self.kind} noise; gaussian noise needs a "
                "value above 0, other noise 0"
            )
        if self.kind == "levels" and not 0 < self.t0 <= self.t1:
            raise UsageError(
                f"config.noise.t0 is {self.t0} and t1 {self.t1}; levels need 0 < t0 <= t1"
            )
        if self.kind != "levels" and (self.t1 or (self.kind == "gaussian" and self.t0)):
            raise UsageError(
                f"config.noise has t0 {self.t0} and t1 {self.t1} with {self.kind} noise; they are "
                "for levels: set them to 0"
            )
        for name, choices in (("distribution", DISTRIBUTIONS), ("weight", WEIGHTS)):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"config.noise.{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(choices)}"
                )
        if not 0 <= self.label_drop < 1:
            raise UsageError(f"config.noise.label_drop is {self.label_drop}; expected 0 <= p < 1")

    def of_data(self, shape: Shape) -> "Noise":
        """What likelihoods of the data itself need: of images uniform noise, of arrays none.

        A flow trained on levels is told the least one.
        """
        return Noise("none" if is_arrays(shape) else "uniform", t0=self.t0)

    def at(self, level: float) -> "Noise":
        """The noise of one level."""
        return dataclasses.replace(self, t0=level, t1=level)

    def levels(self, key: Key[Array, ""], *shape: int) -> Float[Array, "*B"] | None:
        """What a noise-conditional flow is told of as many images; None for any other flow."""
        if self.kind == "levels":
            share = jax.random.uniform(key, shape)
            return DISTRIBUTIONS[self.distribution](share, self.t0, self.t1)
        return jnp.full(shape, self.t0) if self.t0 else None

    def weights(self, levels: Float[Array, "*B"] | None) -> Float[Array, "*B"] | None:
        """Of images with such levels in the loss; None where all count alike."""
        return WEIGHTS[self.weight](levels) if self.kind == "levels" else None

    def add(
        self,
        image: Num[Array, "..."],
        key: Key[Array, ""],
        pixel_scale: Any,
        levels: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "..."]:
        """Noisy pixel values, in pixel units."""
        if self.kind == "none":
            return image
        if self.kind == "uniform":
            return image + jax.random.uniform(key, image.shape)
        std: Any = self.std
        if self.kind == "levels":
            levels = jnp.asarray(levels)
            std = levels.reshape(*levels.shape, *[1] * (image.ndim - levels.ndim))
        return image + std * pixel_scale * jax.random.normal(key, image.shape)

    def add_by_example(
        self, image: Num[Array, "B *X"], keys: Key[Array, "B"], pixel_scale: Any
    ) -> tuple[Float[Array, "B *X"], Float[Array, "B"] | None]:
        """`add` with a key for each example, and the level that it draws."""

        def one(image, key):
            levels = self.levels(jax.random.fold_in(key, Purpose.LEVEL))
            return self.add(image, key, pixel_scale, levels), levels

        return jax.vmap(one)(image, keys)

    def augment(
        self,
        image: Num[Array, "B *X"],
        label: Int[Array, "B"],
        *,
        seed: int,
        step: Int[Array, ""],
        pixel_scale: Any,
    ) -> tuple[Float[Array, "B *X"], Condition]:
        """The training input of `step`: noisy pixel values, labels with some dropped, levels."""
        if self.flip:
            mirrored = jax.random.bernoulli(key_for(seed, step, Purpose.FLIP), 0.5, label.shape)
            image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
        if self.label_drop:
            key = key_for(seed, step, Purpose.LABEL_DROP)
            dropped = jax.random.bernoulli(key, self.label_drop, label.shape)
            label = jnp.where(dropped, NO_LABEL, label)
        levels = self.levels(key_for(seed, step, Purpose.LEVEL), *label.shape)
        x = self.add(image, key_for(seed, step, Purpose.PIXELS), pixel_scale, levels)
        return x, Condition(label, levels)


def _truncated_normal(share: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The quantile of a normal distribution on [0, 1], which are two standard deviations out."""
    least = jax.scipy.stats.norm.cdf(-2.0)
    return jax.scipy.stats.norm.ppf(least + share * (1 - 2 * least)) / 4 + 0.5
