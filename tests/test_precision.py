"""A bfloat16 net inside a float32 flow, rematerialisation, and what jit compiles."""

import functools

import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_laws import jit

from jetflow.flows import affine

BUILDERS = {"jet": flow_laws.jet, "tarflow": functools.partial(flow_laws.tarflow, num_classes=3)}


def apply(flow, variables, value, method):
    label = jnp.array([0, 2, -1]) if flow.num_classes else None
    return jit(functools.partial(flow.apply, method=method))(variables, value, label)


@pytest.fixture(params=BUILDERS, scope="module")
def runs(request):
    """dtype → (x, z, logdet, x again, its log-det)."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        flow = BUILDERS[request.param](dtype=dtype, image_shape=(8, 8, 1), width=16)
        variables = flow_laws.random_variables(flow, jnp.float32)
        x = flow_laws.random_images(flow)
        there = apply(flow, variables, x, "forward")
        found[dtype] = x, *there, *apply(flow, variables, there[0], "inverse")
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_logdets_are_float32(runs, dtype):
    assert [value.dtype for value in runs[dtype]] == [jnp.float32] * 5


def test_x(runs):
    for dtype in runs:
        x, z, logdet, back, back_logdet = runs[dtype]
        print(dtype, abs(back-x).max(), abs(logdet+back_logdet).max())
    print(abs(runs["float32"][1]-runs["bfloat16"][1]).max(), abs(runs["float32"][2]-runs["bfloat16"][2]).max(), runs["float32"][2], z.std())
