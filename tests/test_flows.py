"""The laws of `flow_laws` hold for every flow; `test_planted_bugs` shows that they can fail."""

import dataclasses
import functools
import math

import chex
import flow_laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_laws import FLOWS, LAWS, Case, case, close, jet, random_variables, tarflow

import jetflow
from jetflow.flows import coupling
from jetflow.flows.pixels import FEATURE_ORDERS, Pixels
from jetflow.nn import encoder
from jetflow.training.step import abstract_variables
from jetflow.types import Condition, Flow, UsageError

pytestmark = pytest.mark.usefixtures("float64")

# Whose parts are among those of the other flows.
SLOW = ["jet, every spatial split", "jet, odd number of rows", "tarflow, blocks of different depth"]
all_flows = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FLOWS]
)
TARFLOWS = ["tarflow, 3 blocks, colour", "tarflow, classes", "tarflow, volume preserving"]


@pytest.mark.parametrize("law", LAWS)
@all_flows
def test_law(name, law):
    law(case(name))


@pytest.mark.parametrize("name", TARFLOWS)
def test_tokens_depend_on_their_past_alone(name):
    flow_laws.tokens_depend_on_their_past_alone(case(name))


@pytest.mark.parametrize("name", [name for name in FLOWS if "classes" in name])
@pytest.mark.parametrize("law", [flow_laws.labels_matter, flow_laws.minus_one_is_no_label])
def test_law_of_labels(name, law):
    law(case(name))


@pytest.mark.parametrize("name", [name for name in FLOWS if "noise-conditional" in name])
def test_law_of_noise_levels(name):
    flow_laws.noise_levels_matter(case(name))


@all_flows
def test_shapes_and_protocol(name):
    flow, (z, logdet) = case(name).flow, case(name).there
    assert isinstance(flow, Flow)
    chex.assert_shape([z, logdet], [(3, *flow.latent_shape), (3,)])
    chex.assert_type([z, logdet], jnp.float64)


@pytest.mark.parametrize("name", ["jet, classes", "tarflow, classes"])
def test_of_each_block(name):
    """Its log-determinant, scale and tokens; the first block of sampling is the last of encoding.

    Nothing is paid for them where they are not asked for.
    """
    one = case(name)
    flow, variables, x, label = one.flow, one.variables, one.x, one.label
    there = jax.jit(functools.partial(flow.apply, method="forward_blocks"))(variables, x, label)
    chex.assert_trees_all_close(there[:2], one.there)
    close(there.block_logdets.sum(0) + flow.pixel_logdet, there.logdet)
    close(there.block_scales[-1], np.sqrt(np.mean(np.asarray(there.z) ** 2)))
    back_again = functools.partial(flow.apply, method="inverse_blocks")
    back = jax.jit(back_again)(variables, there.z, label)
    chex.assert_trees_all_close(back[:2], one.back)
    chex.assert_shape(back.tokens, (2, 3, *flow.latent_shape))
    close(flow.as_image(back.tokens[-1]), back.x)
    assert back.sweeps.tolist() == ([1, 1] if "jet" in name else [3, 3])
    sizes = [
        jax.jit(function).lower(variables, there.z, label).compile().memory_analysis()
        for function in (functools.partial(flow.apply, method="inverse"),
                         lambda *args: back_again(*args)[:2])
    ]  # fmt: skip
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes


# What holds for one of the two flows.


def test_jet_is_the_identity_at_initialisation():
    flow = jet(num_couplings=3)
    x = flow_laws.random_images(flow)

    @jax.jit
    def at_initialisation(x):
        return flow.apply(flow.init(jax.random.key(0, impl="rbg"), x), x, method="forward")

    for actual, expected in zip(at_initialisation(x), jax.jit(flow.pixels.forward)(x), strict=True):
        close(actual, expected)


def test_a_coupling_changes_one_half_of_the_tokens():
    """The spatial splits of layers 0 to 5, seen from outside."""
    one = case("jet, every spatial split")
    flow, variables, tokens = one.flow, one.variables, one.rescaled[0]
    one_layer = dataclasses.replace(flow.blocks[0], num_couplings=1)
    forward = jax.jit(lambda *args: one_layer.apply(*args, Condition(), method="forward_blocks")[0])
    row, column = np.indices((2, 2))
    changed = [row + column, row + column + 1, column, column + 1, row, row + 1]
    for layer, pattern in enumerate(changed):
        z = forward(_layer(variables, layer), tokens)
        is_changed = np.abs(np.asarray(z) - tokens).min((0, 2)) > 0
        np.testing.assert_array_equal(is_changed, pattern.reshape(-1) % 2 == 1)


def _layer(variables, layer: int):
    """The variables of one coupling."""
    blocks = {name: tree["blocks_0"] for name, tree in variables.items()}
    return jax.tree.map(lambda leaf: leaf[layer : layer + 1], blocks)


def test_channel_splits_are_fixed_by_the_layer():
    few, many = (coupling.splits(n, ("channels",), (2, 2), 12).feature_order for n in (3, 5))
    np.testing.assert_array_equal(few, many[:3])
    assert len(np.unique(many, axis=0)) == 5
    np.testing.assert_array_equal(np.sort(many), np.tile(np.arange(12), (5, 1)))
    # Two layers in a row transform every feature once.
    np.testing.assert_array_equal(np.sort(np.concatenate([many[0, 6:], many[1, 6:]])), range(12))


def test_convolutions_see_the_tokens_where_they_are_in_the_image():
    """At each place of the grid lies, of a half, a token from there or from right beside it."""
    grid, kinds = (4, 6), ("channels", *["spatial"] * 6)
    splits = coupling.splits(7, kinds, grid, 2)
    there = np.indices(grid, float)
    tokens = [np.broadcast_to(axis.reshape(1, -1, 1), (1, 24, 2)) for axis in there]
    for layer, places in enumerate(coupling.places(7, kinds, grid)):
        split = coupling.Splits(*(values[layer] for values in splits))
        for x, place in zip(tokens, there, strict=True):
            half = np.asarray(coupling.divide(jnp.asarray(x), split)[0])
            laid_out = half[0, places, 0].reshape(grid)
            assert np.abs(laid_out - place).max() <= (1 if layer else 0)


def test_a_product_with_neighbourhoods_is_a_convolution(float64):
    shapes = [(2, 4, 5, 3), (3, 3, 3, 7)]
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    product = encoder.neighbourhoods(x) @ kernel.reshape(27, 7)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(product, expected, rtol=1e-12)


def test_both_nets_have_equally_many_parameters():
    def count(net):
        flow = jet((16, 16, 3), width=128, net=net, block_depth=2)
        leaves = jax.tree.leaves(abstract_variables(flow)["params"])
        return sum(math.prod(leaf.shape) for leaf in leaves)

    assert count("conv") != count("vit")
    assert abs(count("conv") / count("vit") - 1) < 0.01


def test_jet_expands_by_less_than_its_cap():
    one = case("jet, mixed splits, deep nets, colour")
    sigmoids_to_one = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.asarray(leaf) + 12.0 * (path[-2].key == "proj_out") * (path[-1].key == "bias")
        ),
        one.variables["params"],
    )
    saturated = dataclasses.replace(one, variables=one.variables | {"params": sigmoids_to_one})
    stretched = np.asarray(saturated.there[1]) - saturated.rescaled[1]
    assert (stretched < one.flow.logdet_cap).all()
    assert (stretched > 0.999 * one.flow.logdet_cap).all()


def test_a_single_token_has_no_past():
    flow = tarflow((2, 2, 3))
    one = Case(flow, random_variables(flow), flow_laws.random_images(flow), None)
    for actual, expected in zip(one.there, one.rescaled, strict=True):
        np.testing.assert_array_equal(actual, expected)
    close(one.back[0], one.x)


def test_volume_preserving_flows_keep_their_volume():
    one = case("tarflow, volume preserving")
    close(one.there[1], one.rescaled[1])


@pytest.mark.parametrize("order", FEATURE_ORDERS)
def test_patches_are_ordered_row_by_row(order):
    """Against the published rearrangements, by index."""
    pixels = Pixels((4, 6, 3), 2, 127.5, order)
    x = np.random.default_rng(0).uniform(0, 256, (2, 4, 6, 3))
    tokens, logdet = pixels.forward(jnp.asarray(x))
    for token, feature in np.ndindex(*pixels.token_shape):
        shape = (2, 2, 3) if order == "hwc" else (3, 2, 2)
        index = dict(zip(order, np.unravel_index(feature, shape), strict=True))
        row, column = divmod(token, 3)
        value = x[:, 2 * row + index["h"], 2 * column + index["w"], index["c"]]
        np.testing.assert_allclose(tokens[:, token, feature], value / 127.5 - 1, rtol=1e-12)
    np.testing.assert_allclose(logdet, -72 * math.log(127.5))
    back, back_logdet = pixels.inverse(tokens)
    np.testing.assert_allclose(back, x, rtol=1e-12)
    np.testing.assert_allclose(back_logdet, -logdet)


# What a user can get wrong.


@pytest.mark.parametrize(
    ("fields", "image_shape", "message"),
    [
        ({"kind": "glow"}, (4, 4, 1), "kind is 'glow'; expected one of jet, tarflow"),
        ({"patch_size": 3}, (4, 4, 1), "height 4 is not divisible by patch 3"),
        ({"patch_size": 0}, (4, 4, 1), "patch_size is 0"),
        ({"num_head": 2}, (4, 4, 1), "num_head .* did you mean num_heads"),
        ({"num_heads": 3}, (4, 4, 1), "width 8 is not divisible by num_heads 3"),
        ({"dtype": "float16"}, (4, 4, 1), "dtype is 'float16'"),
        ({"net": "mlp"}, (4, 4, 1), "net is 'mlp'; expected one of vit, conv"),
        ({"remat": "some"}, (4, 4, 1), "remat is 'some'"),
        ({"kinds": ("diagonal",)}, (4, 4, 1), "kinds is"),
        ({"kinds": ()}, (4, 4, 1), "kinds is"),
        ({"kinds": ("spatial",)}, (6, 6, 1), "two halves of equal size"),
        ({"kinds": ("channels",), "patch_size": 1}, (4, 4, 3), "even number of features"),
        ({"kinds": ("spatial",), "patch_size": 1}, (4, 4, 3), "even number of features"),
        ({"kind": "tarflow", "layers_per_block": (1, 1, 1)}, (4, 4, 1), "3 entries for 2 blocks"),
        ({"kind": "tarflow", "head_dim": 5}, (4, 4, 1), "width 8 is not divisible by head_dim 5"),
    ],
)  # fmt: skip
def test_impossible_flows_are_refused(fields, image_shape, message):
    with pytest.raises(UsageError, match=message):
        usual = flow_laws.TARFLOW if fields.get("kind") == "tarflow" else flow_laws.JET
        flow = jetflow.build(usual | fields, image_shape=image_shape)
        jax.eval_shape(flow.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


def test_images_of_another_size_are_refused():
    flow, variables = case("jet, channel splits").flow, case("jet, channel splits").variables
    with pytest.raises(UsageError, match=r"inputs are \(4, 6, 1\); .* built for \(4, 4, 1\)"):
        flow.apply(variables, jnp.zeros((1, 4, 6, 1)), method="forward")
