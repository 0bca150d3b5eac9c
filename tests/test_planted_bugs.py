"""Each law of `flow_laws` fails where it should: for a bug in the one function that it guards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flow_laws
import planted_bugs as bugs
import pytest
from flow_laws import case

from jetflow.flows import affine, autoregressive, coupling
from jetflow.flows.autoregressive import AutoregressiveBlock
from jetflow.flows.coupling import Couplings
from jetflow.flows.pixels import Pixels
from jetflow.nn import encoder, transformer

pytestmark = pytest.mark.usefixtures("float64", "fresh_traces")


ROUND_TRIP = flow_laws.inverse_undoes_forward
JACOBIAN = flow_laws.logdet_is_that_of_the_jacobian
CANCEL = flow_laws.logdets_of_both_directions_cancel
CAUSAL = flow_laws.tokens_depend_on_their_past_alone
LABELS = flow_laws.labels_matter
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
JET_CLASSES, TARFLOW_CLASSES = "jet, classes", "tarflow, classes"
BLOCK = AutoregressiveBlock

BUGS = [
    Bug(JACOBIAN, TARFLOW, affine, "normalise", bugs.negative_logdet),
    Bug(CANCEL, TARFLOW, affine, "denormalise", bugs.negative_logdet),
    Bug(JACOBIAN, CHANNELS, affine, "squash", bugs.mean_logdet),
    Bug(JACOBIAN, CHANNELS, affine, "squash", bugs.sigmoid_alone),
    Bug(JACOBIAN, CHANNELS, Pixels, "forward", bugs.no_logdet),
    Bug(CANCEL, TARFLOW, Pixels, "inverse", bugs.no_logdet),
    Bug(ROUND_TRIP, COLOUR, Pixels, "unpatchify", bugs.unpatchify_with_the_order_of_patchify),
    Bug(ROUND_TRIP, CHANNELS, coupling, "merge", bugs.merge_without_inverting),
    Bug(ROUND_TRIP, SPATIAL, coupling, "merge", bugs.merge_with_halves_swapped),
    Bug(ROUND_TRIP, SPATIAL, Couplings, "_scan", bugs.in_order_of_the_layers),
    Bug(CAUSAL, TARFLOW, BLOCK, "_predict", bugs.without_shift_by_one_token),
    Bug(CAUSAL, TARFLOW, transformer, "attend", bugs.attend_to_the_next_token),
    Bug(CAUSAL, TARFLOW, transformer, "attend", bugs.attend_to_oneself_alone),
    Bug(CAUSAL, TWO_BLOCKS, BLOCK, "_in_order", bugs.always_in_image_order),
    Bug(
        ROUND_TRIP, TARFLOW, transformer.TransformerLayer, "extend", bugs.cache_written_one_too_late
    ),
    Bug(NO_LABEL, JET_CLASSES, encoder, "class_token", bugs.minus_one_is_the_last_class),
    Bug(NO_LABEL, TARFLOW_CLASSES, autoregressive, "class_token", bugs.minus_one_is_the_last_class),
    Bug(LABELS, TARFLOW_CLASSES, autoregressive, "class_token", bugs.same_label_for_all),
]


def name_of(bug: Bug) -> str:
    return f"{bug.name} {bug.plant.__name__} breaks {bug.law.__name__}"


@pytest.mark.parametrize("bug", BUGS, ids=name_of)
def test_bug_is_caught(bug, monkeypatch):
    sound = case(bug.flow)  # made before the bug is planted
    monkeypatch.setattr(bug.owner, bug.name, bug.plant(getattr(bug.owner, bug.name)))
    with pytest.raises(AssertionError):
        bug.law(dataclasses.replace(sound))
