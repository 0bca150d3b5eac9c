"""How the blocks of a TarFlow are inverted: methods by name, and what guidance needs."""

import math

import numpy as np
from jaxtyping import Int

from jetflow.types import GUIDANCE_RULES, AnyArray, Decoding, Flow, Guidance, UsageError

METHODS = ("cached", "jacobi")
CACHE_DTYPES = ("float32", "bfloat16", "int8")
WINDOW = 256  # tokens a sweep, where no calibration says better
TOLERANCE = 3e-6


def decodings(
    flow: Flow,
    method: str = "cached",
    *,
    window: int = WINDOW,
    tolerance: float = TOLERANCE,
    cache_dtype: str | None = None,
) -> tuple[Decoding, ...] | None:
    """The `Decoding` of each block; None for a flow that is inverted in one pass.

    Args:
        method: "cached", token by token, or "jacobi", by windows of tokens.
        window, tolerance, cache_dtype: see `Decoding`; the first two are for "jacobi".

    Raises:
        UsageError: on an unknown method, or one that the flow does not have.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; expected {' or '.join(METHODS)}")
    if not flow.decoded_blocks:
        if method != "cached" or cache_dtype:
            given = f"cache_dtype is {cache_dtype!r}" if cache_dtype else f"method is {method!r}"
            raise UsageError(f"{given}, for TarFlow; leave it out: Jet is inverted in one pass")
        return None
    how = Decoding(cache_dtype=cache_dtype)
    if method == "jacobi":
        how = Decoding(window, tolerance, cache_dtype)
    return (how,) * flow.decoded_blocks


def check_decoding(flow: Flow, decoding: tuple[Decoding, ...] | None) -> None:
    """Raise a UsageError on a number out of range, or not as many as there are blocks."""
    if decoding is not None and len(decoding) != flow.decoded_blocks:
        raise UsageError(
            f"there are {len(decoding)} decodings for the {flow.decoded_blocks} blocks that are "
            "decoded; expected one a block"
        )
    for how in decoding or ():
        if how.window < 1:
            raise UsageError(f"window is {how.window}; expected 1 or more")
        if not 0 <= how.tolerance < math.inf:
            raise UsageError(f"tolerance is {how.tolerance}; expected 0 or more")
        if how.cache_dtype not in (None, *CACHE_DTYPES):
            raise UsageError(
                f"cache_dtype is {how.cache_dtype!r}; expected one of {', '.join(CACHE_DTYPES)}"
            )


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
    if guidance.rule not in GUIDANCE_RULES:
        raise UsageError(
            f"guide_rule is {guidance.rule!r}; expected one of {', '.join(GUIDANCE_RULES)}"
        )
    if not 0 <= guidance.blocks <= flow.decoded_blocks:
        raise UsageError(
            f"guide_blocks is {guidance.blocks}; expected 0 for all, to {flow.decoded_blocks}"
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
