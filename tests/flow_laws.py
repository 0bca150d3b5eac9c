"""Small flows in float64 on random parameters, and the laws that they obey.

At initialisation a flow is the identity and every law holds there, whatever is broken. So no
parameter stays where initialisation puts it, and `Case` asserts that the map is far from identity.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jetflow import build
from jetflow.flows.stack import Stack

JET = {"kind": "jet", "patch_size": 2, "width": 8, "num_heads": 2, "num_couplings": 2}
JET |= {"block_depth": 1, "kinds": ("channels", "spatial"), "dtype": "float64"}
TARFLOW = {"kind": "tarflow", "patch_size": 2, "width": 8, "num_blocks": 2, "layers_per_block": 1}
TARFLOW |= {"head_dim": 4, "dtype": "float64"}


def jet(image_shape=(4, 4, 1), num_classes=0, **fields) -> Stack:
    return build(JET | fields, image_shape=image_shape, num_classes=num_classes)


def tarflow(image_shape=(4, 4, 1), num_classes=0, **fields) -> Stack:
    return build(TARFLOW | fields, image_shape=image_shape, num_classes=num_classes)


FLOWS = {
    "jet, channel splits": lambda: jet(kinds=("channels",)),
    "jet, every spatial split": lambda: jet(kinds=("spatial",), num_couplings=6),
    "jet, default cycle, colour": lambda: jet((4, 4, 3), kinds=("channels",) * 4 + ("spatial",),
                                              num_couplings=6),
    "jet, classes": lambda: jet(num_classes=3),
    "jet, two layers in a net": lambda: jet(block_depth=2, scale_factor=1.5),
    "jet, odd number of rows": lambda: jet((6, 4, 1), kinds=("spatial",), num_couplings=4),
    "jet, odd grid": lambda: jet((6, 2, 1), kinds=("channels",)),
    "jet, one token": lambda: jet((2, 2, 3), kinds=("channels",)),
    "tarflow, 1 block": lambda: tarflow(num_blocks=1),
    "tarflow, 2 blocks, colour": lambda: tarflow((4, 4, 3)),
    "tarflow, 3 blocks": lambda: tarflow(num_blocks=3),
    "tarflow, blocks of different depth": lambda: tarflow(layers_per_block=(2, 1)),
    "tarflow, classes": lambda: tarflow(num_classes=3),
    "tarflow, volume preserving": lambda: tarflow(volume_preserving=True),
    "tarflow, volume preserving, classes": lambda: tarflow(num_classes=3, volume_preserving=True),
    "tarflow, odd grid": lambda: tarflow((3, 3, 1), patch_size=1, pixel_scale=127.5),
    "tarflow, wide image": lambda: tarflow((2, 8, 1)),
}  # fmt: skip


def random_variables(flow: Stack, dtype=jnp.float64, seed: int = 0) -> dict[str, Any]:
    """A flow's variables with every parameter at its usual scale, plus 0.1·N(0, 1)."""
    label = jnp.zeros(1, jnp.int32) if flow.num_classes else None

    def init():
        return flow.init(jax.random.key(0), jnp.zeros((1, *flow.image_shape)), label)

    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        layer, name = path[-2].key, path[-1].key
        usual = 1.0 if name == "scale" else 0.0
        if name == "kernel" and layer != "proj_out":
            usual = rng.standard_normal(leaf.shape) / math.sqrt(leaf.shape[-2])
        return jnp.asarray(usual + 0.1 * rng.standard_normal(leaf.shape), dtype)

    shapes = jax.eval_shape(init)
    others = [name for name in shapes if name not in ("params", "intermediates")]
    # Compiled without the random numbers of the parameters, whose compilation takes seconds.
    rest = jax.jit(lambda: {name: init()[name] for name in others})() if others else {}
    return {"params": jax.tree_util.tree_map_with_path(draw, shapes["params"]), **rest}


def random_images(flow: Stack, count: int = 3, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(0, 256, (count, *flow.image_shape)))


class Case(NamedTuple):
    """A flow with variables and inputs; the last of the three labels is none."""

    flow: Stack
    variables: dict[str, Any]
    x: jax.Array
    label: jax.Array | None

    def forward(self, x, label):
        return self.flow.apply(self.variables, x, label, method="forward")

    def inverse(self, z, label):
        return self.flow.apply(self.variables, z, label, method="inverse")


@functools.cache
def case(name: str) -> Case:
    flow = FLOWS[name]()
    label = jnp.array([0, 2, -1]) if flow.num_classes else None
    return Case(flow, random_variables(flow), random_images(flow), label)


class Evidence(NamedTuple):
    """What the laws compare: an image's way there and back, and the Jacobian of the way there."""

    case: Case
    tokens: jax.Array
    z: jax.Array
    logdet: jax.Array
    back: jax.Array
    back_logdet: jax.Array
    log_jacobian: jax.Array


def evidence(case: Case) -> Evidence:
    @jax.jit
    def compute(x, label):
        z, logdet = case.forward(x, label)
        back, back_logdet = case.inverse(z, label)

        def one(x, label):
            label = None if label is None else label[None]
            return case.forward(x[None], label)[0].ravel()

        jacobian = jax.vmap(jax.jacfwd(one))(x, label).reshape(len(x), z[0].size, -1)
        log_jacobian = jnp.linalg.slogdet(jacobian).logabsdet
        return case.flow.pixels.forward(x)[0], z, logdet, back, back_logdet, log_jacobian

    return Evidence(case, *compute(case.x, case.label))


def is_far_from_identity(found: Evidence) -> None:
    moved = jnp.sqrt(jnp.mean((found.z - found.tokens) ** 2, axis=(1, 2)))
    assert moved.min() > 0.05
    stretched = found.log_jacobian - found.case.flow.pixels.forward(found.case.x)[1]
    assert found.case.flow.learned_prior or jnp.abs(stretched).min() > 0.05


def inverse_undoes_forward(found: Evidence) -> None:
    np.testing.assert_allclose(found.back, found.case.x, rtol=0, atol=1e-9)


def logdet_is_that_of_the_jacobian(found: Evidence) -> None:
    np.testing.assert_allclose(found.logdet, found.log_jacobian, rtol=0, atol=1e-9)


def logdets_of_both_directions_cancel(found: Evidence) -> None:
    np.testing.assert_allclose(found.back_logdet, -found.logdet, rtol=0, atol=1e-9)


LAWS = {
    law.__name__: law
    for law in (
        is_far_from_identity,
        inverse_undoes_forward,
        logdet_is_that_of_the_jacobian,
        logdets_of_both_directions_cancel,
    )
}


def influence(case: Case, block: int) -> np.ndarray:
    """[T, T] of a TarFlow block: how much output token i depends on input token j."""
    shape = case.flow.latent_shape
    tokens = case.flow.pixels.forward(case.x[:1])[0]
    label = None if case.label is None else case.label[:1]

    @jax.jit
    def run(tokens):
        method = lambda flow, tokens: flow.blocks[block].forward(tokens, label)[0]  # noqa: E731
        return case.flow.apply(case.variables, tokens, method=method)

    jacobian = jax.jacfwd(run)(tokens).reshape(*shape, *shape)
    return np.asarray(jnp.abs(jacobian).sum((1, 3)))


def tokens_depend_on_their_past_alone(case: Case) -> None:
    """Blocks decode from the first token to the last and back, in turns."""
    for block in range(len(case.flow.blocks)):
        strength = influence(case, block)
        in_order = strength[::-1, ::-1] if block % 2 else strength
        assert (np.triu(in_order, 1) == 0).all(), f"block {block} sees tokens that come later"
        past = in_order[np.tril_indices(len(in_order))]
        assert (past > 1e-6).all(), f"block {block} does not see all tokens before"


def labels_matter(case: Case) -> None:
    """Each example is mapped by its own label, in both directions."""
    x = jnp.tile(case.x[:1], (3, 1, 1, 1))
    tokens = case.flow.pixels.forward(x)[0]
    for function, same in ((case.forward, x), (case.inverse, tokens)):
        value, logdet = jax.jit(function)(same, case.label)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert jnp.abs(value[a] - value[b]).max() > 1e-3
            assert case.flow.learned_prior or jnp.abs(logdet[a] - logdet[b]) > 1e-4


def minus_one_is_no_label(case: Case) -> None:
    tokens = case.flow.pixels.forward(case.x)[0]
    for function, value in ((case.forward, case.x), (case.inverse, tokens)):
        dropped = jax.jit(function)(value, jnp.full(len(case.x), -1))
        for actual, expected in zip(dropped, jax.jit(function)(value, None), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-12)
