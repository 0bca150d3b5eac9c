"""Small flows in float64 on random parameters, and the laws that they obey.

At initialisation a flow is the identity and every law holds there, whatever is broken. So no
parameter stays where initialisation puts it, and `Case` asserts that the map is far from identity.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jetflow import build
from jetflow.flows.stack import Stack
from jetflow.types import Condition

JET = {"kind": "jet", "patch_size": 2, "width": 8, "num_heads": 2, "num_couplings": 2}
JET |= {"block_depth": 1, "kinds": ("channels", "spatial"), "dtype": "float64"}
TARFLOW = {"kind": "tarflow", "patch_size": 2, "width": 8, "num_blocks": 2, "layers_per_block": 1}
TARFLOW |= {"head_dim": 4, "dtype": "float64"}


def jet(image_shape=(4, 4, 1), num_classes=0, **fields) -> Stack:
    return build(JET | fields, image_shape=image_shape, num_classes=num_classes)


def tarflow(image_shape=(4, 4, 1), num_classes=0, **fields) -> Stack:
    return build(TARFLOW | fields, image_shape=image_shape, num_classes=num_classes)


def arrays(section: dict[str, Any], num_classes=0) -> Stack:
    """Of 5 tokens, whose features are standardised."""
    standard = ([100.0, -50.0, 20.0, 0.0], [80.0, 200.0, 30.0, 150.0])
    section = section | {"patch_size": 1}
    return build(section, image_shape=(5, 4), num_classes=num_classes, standard=standard)


FLOWS = {
    "jet, channel splits": lambda: jet(kinds=("channels",)),
    "jet, every spatial split": lambda: jet(kinds=("spatial",), num_couplings=6),
    "jet, mixed splits, deep nets, colour": lambda: jet(
        (4, 4, 3), num_couplings=5, block_depth=2, scale_factor=1.5
    ),
    "jet, classes": lambda: jet(num_classes=3),
    "jet, convolutions, every split, classes": lambda: jet(
        (4, 8, 1), num_classes=3, net="conv", kinds=("channels", *["spatial"] * 6), num_couplings=7
    ),
    "jet, odd number of rows": lambda: jet((6, 4, 1), kinds=("spatial",), num_couplings=4),
    "tarflow, 1 block": lambda: tarflow(num_blocks=1),
    "tarflow, 3 blocks, colour": lambda: tarflow((4, 4, 3), num_blocks=3),
    "tarflow, blocks of different depth": lambda: tarflow(layers_per_block=(2, 1)),
    "tarflow, classes": lambda: tarflow(num_classes=3),
    "tarflow, volume preserving": lambda: tarflow(volume_preserving=True),
    "tarflow, noise-conditional, classes": lambda: tarflow(num_classes=3, noise_conditional=True),
    "jet, noise-conditional": lambda: jet(noise_conditional=True),
    "tarflow, arrays, classes": lambda: arrays(TARFLOW, num_classes=3),
    "jet, arrays": lambda: arrays(JET | {"kinds": ("channels",)}),
    "tarflow, odd grid": lambda: tarflow((3, 5, 1), patch_size=1, pixel_scale=127.5),
}


def random_variables(flow: Stack, dtype=jnp.float64, seed: int = 0) -> dict[str, Any]:
    """A flow's variables with every parameter at its usual scale, plus 0.1·N(0, 1)."""
    label = jnp.zeros(1, jnp.int32) if flow.num_classes else None

    def init():
        image, level = jnp.zeros((1, *flow.image_shape)), jnp.ones(1)
        conditions = (label, level) if flow.noise_conditional else (label,)
        return flow.init(jax.random.key(0), image, *conditions)

    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        layer, name = path[-2].key, path[-1].key
        usual = 1.0 if name == "scale" else 0.0
        if name == "kernel" and layer != "proj_out":
            fan_in = leaf.shape[-3 if layer == "qkv" else -2]
            usual = rng.standard_normal(leaf.shape) / math.sqrt(fan_in)
        return jnp.asarray((usual + 0.1 * rng.standard_normal(leaf.shape)).astype(dtype))

    shapes = jax.eval_shape(init)
    others = [name for name in shapes if name != "params"]
    # Compiled without the random numbers of the parameters, whose compilation takes seconds.
    rest = jax.jit(lambda: {name: init()[name] for name in others})() if others else {}
    return {"params": jax.tree_util.tree_map_with_path(draw, shapes["params"]), **rest}


def random_images(flow: Stack, count: int = 3, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(0, 256, (count, *flow.image_shape)))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A flow with variables and three examples, of which the last has no label.

    What the laws compare is computed once, when a law asks for it.
    """

    flow: Stack
    variables: dict[str, Any]
    x: jax.Array
    label: jax.Array | None
    level: jax.Array | None = None

    def forward(self, x, label, level):
        return self.flow.apply(self.variables, x, label, level, method="forward")

    @functools.cached_property
    def inverse(self):
        def inverse(z, label, level):
            return self.flow.apply(self.variables, z, label, noise_level=level, method="inverse")

        return jax.jit(inverse)

    @functools.cached_property
    def rescaled(self) -> tuple[jax.Array, jax.Array]:
        """What the blocks get of the examples, [B, T, D], and the log-det up to there."""
        return jax.jit(self.flow.pixels.forward)(self.x)

    @functools.cached_property
    def _there_and_jacobian(self):
        def one(x, conditions):
            z, logdet = self.forward(x[None], *jax.tree.map(lambda a: a[None], conditions))
            return z.ravel(), (z[0], logdet[0])

        conditions = self.label, self.level
        return jax.jit(jax.vmap(jax.jacfwd(one, has_aux=True)))(self.x, conditions)

    @property
    def there(self) -> tuple[jax.Array, jax.Array]:
        return self._there_and_jacobian[1]

    @functools.cached_property
    def back(self) -> tuple[jax.Array, jax.Array]:
        return self.inverse(self.there[0], self.label, self.level)

    @property
    def log_jacobian(self) -> np.ndarray:
        """log |det| of each example's Jacobian, by brute force."""
        size = math.prod(self.flow.image_shape)
        jacobian = np.asarray(self._there_and_jacobian[0]).reshape(-1, size, size)
        return np.linalg.slogdet(jacobian).logabsdet


@functools.cache
def case(name: str) -> Case:
    flow = FLOWS[name]()
    label = jnp.array([0, 2, -1]) if flow.num_classes else None
    level = jnp.array([0.02, 0.1, 0.3]) if flow.noise_conditional else None
    return Case(flow, random_variables(flow), random_images(flow), label, level)


def close(actual, expected, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# Laws of every flow.


def is_far_from_identity(case: Case) -> None:
    tokens, logdet = map(np.asarray, case.rescaled)
    moved = np.sqrt(np.mean((np.asarray(case.there[0]) - tokens) ** 2, axis=(1, 2)))
    assert moved.min() > 0.05
    stretched = np.abs(case.log_jacobian - logdet)
    assert case.flow.learned_prior or stretched.max() > 0.05


def inverse_undoes_forward(case: Case) -> None:
    close(case.back[0], case.x)


def logdet_is_that_of_the_jacobian(case: Case) -> None:
    close(case.there[1], case.log_jacobian)


def logdets_of_both_directions_cancel(case: Case) -> None:
    close(case.back[1], -case.there[1])


LAWS = (
    is_far_from_identity,
    inverse_undoes_forward,
    logdet_is_that_of_the_jacobian,
    logdets_of_both_directions_cancel,
)


# Laws of some.


def tokens_depend_on_their_past_alone(case: Case) -> None:
    """z_i = x_i·a + b, where a and b see all of the tokens before i, in the block's direction."""
    condition = Condition(*jax.tree.map(lambda a: a[:1], (case.label, case.level)))
    tokens, features = case.flow.latent_shape
    for index in range(len(case.flow.blocks)):

        def block(x, index=index):
            method = lambda flow, x: flow.blocks[index].forward_blocks(x, condition)[0]  # noqa: E731
            return case.flow.apply(case.variables, x[None], method=method)[0]

        jacobian = np.abs(jax.jit(jax.jacfwd(block))(case.rescaled[0][0])).swapaxes(1, 2)
        if index % 2:  # decodes from the last token to the first
            jacobian = jacobian[::-1, ::-1]
        row, column = np.indices((tokens, tokens))
        assert (jacobian[row < column] == 0).all(), f"block {index} sees tokens that come later"
        mixed = jacobian[row == column] * (1 - np.eye(features))
        assert (mixed == 0).all(), f"block {index} sees the token that it transforms"
        assert (jacobian[row == column].sum(1) > 0).all()
        past = jacobian[row > column].sum((1, 2))
        assert (past > 1e-6).all(), f"block {index} does not see all tokens before"


def labels_matter(case: Case) -> None:
    """Each example is mapped by its own label, in both directions."""
    same_x, same_tokens = (np.stack([value[0]] * 3) for value in (case.x, case.rescaled[0]))
    for function, same in ((jax.jit(case.forward), same_x), (case.inverse, same_tokens)):
        value, logdet = map(np.asarray, function(same, case.label, case.level))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(value[a] - value[b]).max() > 1e-3
            assert abs(logdet[a] - logdet[b]) > 1e-4


def minus_one_is_no_label(case: Case) -> None:
    """The last example, whose label is -1, is mapped as all are without labels."""
    there = jax.jit(case.forward)(case.x, None, case.level)
    back = case.inverse(case.there[0], None, case.level)
    for actual, expected in zip(there + back, case.there + case.back, strict=True):
        np.testing.assert_allclose(actual[-1], expected[-1], rtol=1e-12)


def noise_levels_matter(case: Case) -> None:
    """Each example is mapped by its own level, in both directions."""
    same_x, same_tokens = (np.stack([value[0]] * 3) for value in (case.x, case.rescaled[0]))
    for function, same in ((jax.jit(case.forward), same_x), (case.inverse, same_tokens)):
        value, logdet = map(np.asarray, function(same, None, case.level))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(value[a] - value[b]).max() > 1e-3
            assert abs(logdet[a] - logdet[b]) > 1e-4
