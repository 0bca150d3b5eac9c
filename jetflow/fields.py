"""Trees of named fields, such as configs: their leaves, and where two of them differ."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_SHOWN = 4  # fields that differ
# Fields that the configs of older runs lack, with what counts for those.
LATER = {
    "flow.precision": "default",
    "flow.attention": "auto",
    "flow.noise_conditional": False,
    "noise.t0": 0.0,
    "noise.t1": 0.0,
    "noise.distribution": "uniform",
    "noise.weight": "t",
    "eval.guide_rule": "log_scale",
    "eval.guide_blocks": 0,
    "eval.denoise_steps": 1,
    "eval.denoise_clip": False,
    "eval.denoise_eta": 0.0,
}


def flat(tree: Mapping[str, Any], prefix: str = "config.") -> dict[str, Any]:
    """The leaves of a tree of dicts by their names, such as "config.optim.lr"."""
    leaves = {}
    for key, node in tree.items():
        name = f"{prefix}{key}"
        leaves |= flat(node, f"{name}.") if isinstance(node, dict) else {name: node}
    return leaves


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    free: Sequence[str] = (),
    prefix: str = "config.",
) -> dict[str, tuple[Any, Any]]:
    """The fields of two trees that differ, with both values, except `free` ones and those below.

    What the data resolved to counts only where the old tree has it: version 0.1 recorded less.
    """
    old, new = flat(old, prefix), flat(new, prefix)
    later = {name: LATER[field] for name in new for field in LATER if name.endswith(f".{field}")}
    old = later | old
    return {
        name: (old.get(name, "absent"), new.get(name, "absent"))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
        and not any(f"{name}.".startswith(f"{prefix}{field}.") for field in free)
        and (name in old or not name.startswith(f"{prefix}resolved."))
    }


def shown(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences for a person: the first ones, and the number of the others."""
    texts = [f"{name} is {old} there and {new} here" for name, (old, new) in differing.items()]
    more = [f"and {len(texts) - MOST_SHOWN} more"] if len(texts) > MOST_SHOWN else []
    return ", ".join(texts[:MOST_SHOWN] + more)
