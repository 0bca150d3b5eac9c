"""Each law of `flow_laws` fails where it should: for a bug in the one function that it guards."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flow_laws
import jax
import jax.numpy as jnp
import pytest
from flow_laws import case

from jetflow.flows import affine, autoregressive, coupling
from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.coupling import Couplings
from jetflow.flows.pixels import FEATURE_ORDERS, Pixels
from jetflow.nn import attention, transformer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64", "fresh_traces")]


# Each takes the real function and returns a wrong one.


def negative_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, -logdet

    return wrong


def mean_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, logdet / value[0].size

    return wrong


def no_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, 0 * logdet

    return wrong


def merge_without_inverting(real):
    def wrong(x1, x2, split):
        feature_order = jnp.argsort(split.feature_order)
        return real(x1, x2, split._replace(feature_order=feature_order))

    return wrong


def unpatchify_with_the_order_of_patchify(real):
    def wrong(self, tokens):
        x = tokens.reshape(-1, *self.grid, 2, 2, self.image_shape[2])
        return x.transpose(FEATURE_ORDERS["chw"]).reshape(-1, *self.image_shape)

    return wrong


def in_order_of_the_layers(real):
    return lambda self, body, x, reverse: real(self, body, x, reverse=False)


def without_shift_by_one_token(real):
    def wrong(self, x, label):
        hidden = self.proj_in(x) + self._in_order(self.position[None])
        return self._split(self.proj_out(self.transformer(hidden)))

    return wrong


def _attend(query, key, value, visible):
    logits = jnp.einsum("bsnh,btnh->bnst", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible > 0, logits, -jnp.inf))
    return jnp.einsum("bnst,btnh->bsnh", weights, value)


def attend_to_the_next_token(real):
    return lambda query, *args: _attend(query, *args[:2], jnp.tri(query.shape[1], k=1))


def attend_to_oneself_alone(real):
    return lambda query, *args: _attend(query, *args[:2], jnp.eye(query.shape[1]))


def always_in_image_order(real):
    return lambda self, tokens: tokens


def cache_written_one_too_late(real):
    return lambda self, x, cache, start, temperature: real(self, x, cache, start + 1, temperature)


def minus_one_is_the_last_class(real):
    def wrong(embedding, null, label, batch):
        return real(embedding, null, None if label is None else label % len(embedding), batch)

    return wrong


def same_label_for_all(real):
    def wrong(embedding, null, label, batch):
        return real(embedding, null, None if label is None else 0 * label, batch)

    return wrong


def same_level_for_all(real):
    return lambda self, noise_level: real(self, noise_level[:1].repeat(len(noise_level)))


ROUND_TRIP = flow_laws.inverse_undoes_forward
JACOBIAN = flow_laws.logdet_is_that_of_the_jacobian
CANCEL = flow_laws.logdets_of_both_directions_cancel
CAUSAL = flow_laws.tokens_depend_on_their_past_alone
LABELS = flow_laws.labels_matter
LEVELS = flow_laws.noise_levels_matter
NO_LABEL = flow_laws.minus_one_is_no_label


class Bug(NamedTuple):
    """`owner.name` is replaced by `plant(real)`; then `law` fails for `flow`."""

    law: Callable[[Any], None]
    flow: str
    owner: Any
    name: str
    plant: Callable[[Callable], Callable]


TARFLOW, COLOUR = "tarflow, 1 block", "tarflow, 3 blocks, colour"
TWO_BLOCKS = "tarflow, volume preserving"
CHANNELS, SPATIAL = "jet, channel splits", "jet, every spatial split"
TARFLOW_CLASSES = "tarflow, classes"
LEVELS_TARFLOW = "tarflow, noise-conditional, classes"
BLOCK = AutoregressiveBlock

BUGS = [
    Bug(JACOBIAN, TARFLOW, affine, "normalise", negative_logdet),
    Bug(CANCEL, TARFLOW, affine, "denormalise", negative_logdet),
    Bug(JACOBIAN, CHANNELS, affine, "squash", mean_logdet),
    Bug(JACOBIAN, CHANNELS, Pixels, "forward", no_logdet),
    Bug(ROUND_TRIP, COLOUR, Pixels, "unpatchify", unpatchify_with_the_order_of_patchify),
    Bug(ROUND_TRIP, CHANNELS, coupling, "merge", merge_without_inverting),
    Bug(ROUND_TRIP, SPATIAL, Couplings, "_scan", in_order_of_the_layers),
    Bug(CAUSAL, TARFLOW, BLOCK, "_predict", without_shift_by_one_token),
    Bug(CAUSAL, TARFLOW, attention, "written_out", attend_to_the_next_token),
    Bug(CAUSAL, TARFLOW, attention, "written_out", attend_to_oneself_alone),
    Bug(CAUSAL, TWO_BLOCKS, BLOCK, "_in_order", always_in_image_order),
    Bug(ROUND_TRIP, TARFLOW, transformer.TransformerLayer, "extend", cache_written_one_too_late),
    Bug(NO_LABEL, TARFLOW_CLASSES, autoregressive, "class_token", minus_one_is_the_last_class),
    Bug(LABELS, TARFLOW_CLASSES, autoregressive, "class_token", same_label_for_all),
    Bug(LEVELS, LEVELS_TARFLOW, autoregressive.LevelEmbedding, "__call__", same_level_for_all),
]


def name_of(bug: Bug) -> str:
    return f"{bug.name} {bug.plant.__name__} breaks {bug.law.__name__}"


@pytest.mark.parametrize("bug", BUGS, ids=name_of)
def test_bug_is_caught(bug, monkeypatch):
    sound = case(bug.flow)  # made before the bug is planted
    monkeypatch.setattr(bug.owner, bug.name, bug.plant(getattr(bug.owner, bug.name)))
    with pytest.raises(AssertionError):
        bug.law(dataclasses.replace(sound))
