"""What guidance needs of a flow and its labels; `flows.autoregressive` applies it."""

import math

import numpy as np
from jaxtyping import Int

from jetflow.types import AnyArray, Flow, Guidance, UsageError


def check_guidance(flow: Flow, guidance: Guidance | None) -> Guidance | None:
    """The guidance, or None where its strength is zero.

    Raises:
        UsageError: if it could have no effect on this flow, or is malformed.
    """
    if guidance is None:
        return None
    if guidance.what not in ("a", "b", "ab"):
        raise UsageError(
            f"guide_what is {guidance.what!r}; expected a (log-scale), b (shift) or ab (both)"
        )
    if not 0 < guidance.temperature < math.inf:
        raise UsageError(f"attention temperature is {guidance.temperature}; expected more than 0")
    if not math.isfinite(guidance.scale):
        raise UsageError(f"guidance is {guidance.scale}; expected a finite number")
    if guidance.scale == 0:
        return None
    if not flow.decoded_blocks:
        raise UsageError(
            f"guidance is {guidance.scale}, but needs a TarFlow, as Jet's couplings define none; "
            "set it to 0"
        )
    if not flow.num_classes and guidance.temperature == 1:
        raise UsageError(
            "guidance of a flow without labels needs an attention temperature other than 1, else "
            "both passes are the same; set attention_temperature, or guidance to 0"
        )
    return guidance


def check_guided(guidance: Guidance | None, label: Int[AnyArray, "N"] | None) -> None:
    """Raise a UsageError if guidance could have no effect, as no image has a label."""
    if guidance is None or guidance.temperature != 1:
        return
    if label is None or (np.asarray(label) < 0).all():
        raise UsageError(
            f"guidance is {guidance.scale}, but the images have no labels, so both passes are the "
            "same; give labels, or an attention temperature other than 1, or set guidance to 0"
        )
