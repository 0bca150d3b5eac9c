"""Pixels or arrays to tokens and back: rescaling and patches, the first layer of every flow."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jetflow.flows.affine import widen
from jetflow.types import UsageError

# Order of the features in a patch: row, column, colour (Jet); or colour, row, column (TarFlow).
FEATURE_ORDERS = {"hwc": (0, 1, 3, 2, 4, 5), "chw": (0, 1, 3, 5, 2, 4)}


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Pixel values v in 0..256 become v / scale − 1, cut into patches, row by row.

    Attributes:
        image_shape: (height, width, channels).
        patch_size: p; T = (height / p)·(width / p) tokens of D = p²·channels features.
        scale: 127.5 or 128; the log-determinant is −T·D·ln(scale).
        feature_order: a key of `FEATURE_ORDERS`.
    """

    image_shape: tuple[int, int, int]
    patch_size: int
    scale: float
    feature_order: str

    def __post_init__(self):
        if self.patch_size < 1:
            raise UsageError(f"config.flow.patch_size is {self.patch_size}; expected 1 or more")
        for axis, size in zip(("height", "width"), self.image_shape[:2], strict=True):
            if size % self.patch_size:
                raise UsageError(
                    f"image {axis} {size} is not divisible by patch {self.patch_size}; "
                    f"set config.flow.patch_size to a divisor of {size}"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    @property
    def token_shape(self) -> tuple[int, int]:
        """(T, D)."""
        return math.prod(self.grid), self.patch_size**2 * self.image_shape[2]

    def forward(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B T D"], Array]:
        (x,) = widen(x)
        tokens = self.patchify(x / self.scale - 1.0)
        return tokens, jnp.full(x.shape[0], self.logdet, tokens.dtype)

    def inverse(self, tokens: Float[Array, "B T D"]) -> tuple[Float[Array, "B H W C"], Array]:
        (tokens,) = widen(tokens)
        x = (self.unpatchify(tokens) + 1.0) * self.scale
        return x, jnp.full(x.shape[0], -self.logdet, x.dtype)

    @property
    def logdet(self) -> float:
        """Of `forward`, in nats."""
        return -math.prod(self.image_shape) * math.log(self.scale)

    def patchify(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        rows, columns = self.grid
        size = self.patch_size
        x = x.reshape(-1, rows, size, columns, size, self.image_shape[2])
        return x.transpose(FEATURE_ORDERS[self.feature_order]).reshape(-1, *self.token_shape)

    def unpatchify(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B H W C"]:
        size = self.patch_size
        lengths = (size, size, self.image_shape[2])  # h, w, c
        inner = [lengths["hwc".index(axis)] for axis in self.feature_order]
        order = FEATURE_ORDERS[self.feature_order]
        x = tokens.reshape(-1, *self.grid, *inner)
        inverse = sorted(range(6), key=lambda axis: order[axis])
        return x.transpose(inverse).reshape(-1, *self.image_shape)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays of T tokens, of which each feature v becomes (v − mean) / deviation.

    Attributes:
        image_shape: (T, D), also of the tokens.
        mean, deviation: of each of the D features.
    """

    image_shape: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_shape[0], 1

    @property
    def token_shape(self) -> tuple[int, int]:
        return self.image_shape

    @property
    def scale(self) -> Float[np.ndarray, "D"]:
        return np.asarray(self.deviation, np.float32)

    def forward(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Array]:
        (x,) = widen(x)
        tokens = (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.deviation, x.dtype)
        return tokens, jnp.full(x.shape[0], self.logdet, tokens.dtype)

    def inverse(self, tokens: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Array]:
        (x,) = widen(tokens)
        x = x * jnp.asarray(self.deviation, x.dtype) + jnp.asarray(self.mean, x.dtype)
        return x, jnp.full(x.shape[0], -self.logdet, x.dtype)

    @property
    def logdet(self) -> float:
        """Of `forward`, in nats."""
        return -self.image_shape[0] * sum(map(math.log, self.deviation))
