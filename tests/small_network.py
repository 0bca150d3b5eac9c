"""A network in the place of the FID's, as its own takes seconds an image to run and compile.

It has few features, since the metrics take seconds of many.

Run as a script, on devices of its own, it writes the statistics of some images; or, with a command
line of `jetflow`, it runs that with the small network.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetflow import cli
from jetflow.evals import features, inception
from jetflow.evals.batching import Batching
from jetflow.sharding import make_mesh

TOTAL, KEPT = 23, 9


def activations(arrays, images):
    """Random features of the pixels; the sFID's are the first of the same."""
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).reshape(len(images), -1) / 255
    index = jnp.arange(x.shape[1])[:, None]
    pooled = jnp.tanh(x @ jnp.sin(index * jnp.arange(1.0, 49) * arrays["frequency"]))
    return pooled, pooled[:, :24].reshape(-1, 2, 2, 6)


def network(name="a"):
    """The network, with a SHA-256 of these letters."""
    return inception.Network({"frequency": np.float32(0.7)}, sha256=(name * 64)[:64])


def install(patch):
    """Put it in the place of the FID's, by a `pytest.MonkeyPatch`."""
    patch.setattr(inception, "activations", activations)
    patch.setattr(inception, "load", lambda path=None: network())
    patch.setitem(features.SIZES, "pooled", 48)
    patch.setitem(features.SIZES, "spatial", 24)
    function = features._features.__wrapped__
    # Another function to JAX, which keeps what it has compiled of the other.
    patch.setattr(features, "_features", jax.jit(lambda *arguments: function(*arguments)))


def images(count=TOTAL, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), np.uint8)


def collected(batch_size, mesh=None):
    batching = Batching(mesh or make_mesh(), batch_size)
    chunks = (images()[first : first + batch_size] for first in range(0, TOTAL, batch_size))
    statistics = features.Statistics(TOTAL, KEPT)
    return statistics.collect(network(), batching, batching.of_images(chunks), "images")


if __name__ == "__main__":
    install(pytest.MonkeyPatch())
    if sys.argv[1] == "evaluate":
        sys.exit(cli.main(sys.argv[1:]))
    out, size, *axes = sys.argv[1:]
    mesh = make_mesh(**{name: int(n) for name, _, n in (axis.partition("=") for axis in axes)})
    np.savez(out, **collected(int(size), mesh).arrays)
