"""The decoding methods of TarFlow by name."""

from jetflow.types import Decoding, Flow, UsageError

METHODS = ("cached", "jacobi")
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
        UsageError: on an unknown method, one that the flow does not have, or a bad setting of it.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; expected {' or '.join(METHODS)}")
    if window < 1:
        raise UsageError(f"window is {window}; expected 1 or more")
    if not tolerance >= 0:
        raise UsageError(f"tolerance is {tolerance}; expected 0 or more")
    if cache_dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"cache_dtype is {cache_dtype!r}; expected float32 or bfloat16")
    if not flow.decoded_blocks:
        if method != "cached" or cache_dtype:
            raise UsageError("decoding methods are for TarFlow; Jet is inverted in one pass")
        return None
    how = Decoding(cache_dtype=cache_dtype)
    if method == "jacobi":
        how = Decoding(window, tolerance, cache_dtype)
    return (how,) * flow.decoded_blocks
