"""What the published implementations computed (`golden/`, see its README), and jetflow's flows."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jetflow.flows.stack import Stack
from jetflow.tools import convert

GOLDEN = Path(__file__).parent / "golden"
TARFLOWS = ("cond", "uncond", "uncond_vp")
JETS = ("mixed", "spatial_only")
ITARFLOW = "itarflow"  # whose only case is called so here


class Case(NamedTuple):
    """A published model and all that it computed; images are N H W C, in [-1, 1] units."""

    name: str
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    flow: Stack
    variables: dict[str, Any]

    @property
    def label(self) -> jax.Array | None:
        return jnp.asarray(self.arrays["y"], jnp.int32) if "y" in self.arrays else None

    @property
    def size(self) -> int:
        """Dimensions of an image."""
        tokens, features = self.flow.latent_shape
        return tokens * features

    def pixels(self, images: np.ndarray) -> jax.Array:
        """From [-1, 1] units to pixel units."""
        return jnp.asarray((images + 1) * 127.5, jnp.float32)


def tarflow_arguments(settings: dict[str, Any]) -> dict[str, int]:
    return {
        "image_size": settings["img_size"],
        "channels": settings["in_channels"],
        "patch_size": settings["patch_size"],
    }


def jet_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    model = settings["model"]
    return {
        "image_shape": (*settings["image_size"], settings["channels"]),
        "patch_size": model["ps"],
        "num_heads": model["num_heads"],
        "kinds": tuple(model["kinds"]),
    }


def settings_of(name: str) -> dict[str, Any]:
    return json.loads(golden(name, ".json").read_text())


def golden(name: str, ending: str) -> Path:
    if name == ITARFLOW:
        return GOLDEN / f"itarflow/cond{ending}"
    return GOLDEN / ("tarflow" if name in TARFLOWS else "jet") / f"{name}{ending}"


@functools.cache
def case(name: str) -> Case:
    settings = settings_of(name)
    with np.load(golden(name, ".npz"), allow_pickle=False) as file:
        arrays = {
            key: to_nhwc(array) if is_nchw(key) else array
            for key, array in file.items()
            if not key.startswith("params/")
        }
    if name in JETS:
        flow, variables = convert.jet(golden(name, ".npz"), **jet_arguments(settings))
    else:
        read = convert.itarflow if name == ITARFLOW else convert.tarflow
        flow, variables = read(golden(name, ".pth"), **tarflow_arguments(settings))
        arrays = {key.removesuffix("_nchw"): array for key, array in arrays.items()}
    return Case(name, settings, arrays, flow, variables)


def is_nchw(key: str) -> bool:
    return key.endswith("_nchw") or key == "train_eps"


def to_nhwc(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, -3, -1)


def assert_equal(actual, expected) -> None:
    """The same arrays of the same names, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
