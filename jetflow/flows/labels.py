"""Labels as they come from a user."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jetflow.types import Flow, UsageError


def check_labels(flow: Flow, label, num: int) -> Int[Array, "N"] | None:
    """Labels as int32 [N], or None.

    Raises:
        UsageError: if the flow has no labels, or not this one, as far as its value is known: under
            `jax.jit` shape and type alone are.
    """
    if label is None:
        return None
    if not flow.num_classes:
        raise UsageError("label given, but this flow was trained without labels; leave it out")
    is_traced = isinstance(label, jax.core.Tracer)  # its values are not known yet
    labels = label if is_traced else np.asarray(label)
    if labels.shape not in ((), (num,)) or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"label is {labels.dtype.name}{list(labels.shape)}; expected one integer, or {num}"
        )
    if is_traced:
        return jnp.broadcast_to(labels.astype(jnp.int32), (num,))
    labels = np.broadcast_to(labels.astype(np.int32), (num,))
    wrong = labels[(labels < -1) | (labels >= flow.num_classes)]
    if wrong.size:
        raise UsageError(
            f"label {wrong[0]} is out of range; expected 0 to {flow.num_classes - 1}, "
            "or -1 for no label"
        )
    return jnp.asarray(labels)
