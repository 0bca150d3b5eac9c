"""The script for a card, at toy size on CPUs; and the PyTorch TarFlow that it measures against."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flow_laws import random_images, random_variables, tarflow

from jetflow import convert

sys.path.insert(0, str(tiny_runs.ROOT / "benchmarks"))

IMAGE = (8, 8, 3)


@pytest.fixture(scope="module")
def torch_tarflow():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return pytest.importorskip("torch_tarflow")


@pytest.fixture(scope="module")
def both(tmp_path_factory, torch_tarflow):
    """A TarFlow, its variables and images, and the same flow in PyTorch."""
    sizes = dict(patch_size=2, width=128, num_blocks=3, layers_per_block=2)
    flow = tarflow(IMAGE, pixel_scale=127.5, head_dim=64, dtype="float32", **sizes)
    variables = jax.tree.map_with_path(moderate, random_variables(flow, jnp.float32))
    path = tmp_path_factory.mktemp("torch") / "weights.pth"
    convert.to_tarflow(path, flow, variables)
    other = torch_tarflow.TarFlow(IMAGE, patch_size=2, width=128, blocks=3, layers=2)
    other.load(path)
    return flow, variables, random_images(flow).astype(jnp.float32), other


def moderate(path, leaf):
    """Wide nets with random weights overflow after a few blocks."""
    return 0.03 * leaf if "proj_out" in jax.tree_util.keystr(path) else leaf


def test_pytorch_computes_the_same_latents(both):
    """In float32, to rounding: else its speed would be that of something else."""
    import torch

    flow, variables, images, other = both
    z, logdet = flow.apply(variables, images, method="forward")
    assert np.abs(z - flow.pixels.forward(images)[0]).max() > 0.1  # far from the identity
    with torch.no_grad():
        z_torch, logdet_torch = other(torch.tensor(np.array(images)))
    np.testing.assert_allclose(z_torch, z, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logdet_torch, logdet, rtol=1e-5)


def test_pytorch_samples_invert(both, torch_tarflow):
    import torch

    *_, images, other = both
    pixels = torch.tensor(np.array(images))
    with torch.no_grad():
        z, _ = other(pixels)
    sampler = torch_tarflow.Sampler(other, len(pixels), torch.float32)
    np.testing.assert_allclose(sampler.sample(z), pixels, atol=1e-2)  # in units of 0..256
    np.testing.assert_allclose(sampler.sample(z.flip(0)), pixels.flip(0), atol=1e-2)
