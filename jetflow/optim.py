"""Adam with the two papers' weight-decay rules, the schedule, and rates of single parameters."""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jetflow.types import UsageError

DECAY_RULES = ("lr", "schedule")
MOMENT_DTYPES = ("float32", "bfloat16")

Multipliers: TypeAlias = Sequence[Any]  # of (regex, factor), as `factors` checks


def warmup_cosine(lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Step → learning rate: linear from `min_lr` to `lr`, then a cosine down to `min_lr`."""
    ramp = optax.linear_schedule(min_lr, lr, max(warmup_steps, 1))
    cosine = optax.cosine_decay_schedule(lr - min_lr, max(total_steps - warmup_steps, 1))
    return lambda step: jnp.where(
        jnp.less(step, warmup_steps),
        ramp(step),
        min_lr + cosine(jnp.maximum(step - warmup_steps, 0)),
    )


def adam(
    *,
    total_steps: int,
    lr: float,
    min_lr: float,
    warmup: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay_rule: str,
    clip_norm: float,
    mu_dtype: str,
    multipliers: Multipliers = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning-rate schedule.

    Args:
        total_steps: of the whole training.
        lr, min_lr: the schedule's peak, and its ends.
        warmup: share of `total_steps` in which the rate rises.
        b1, b2, eps: of Adam.
        weight_decay: applied to every parameter, decoupled from the gradient.
        decay_rule: "lr" multiplies the decay by the learning rate (AdamW, TarFlow);
            "schedule" by the rate relative to its peak (big_vision, Jet).
        clip_norm: largest global norm of the gradient; 0 for no limit.
        mu_dtype: of Adam's first moment.
        multipliers: of the updates of single parameters, decay included, see `factors`. Those of
            factor 0 have no moments, and do not count in the norm of the gradient.
    """
    for name, value, holds, expected in (
        ("decay_rule", decay_rule, decay_rule in DECAY_RULES, f"one of {', '.join(DECAY_RULES)}"),
        ("mu_dtype", mu_dtype, mu_dtype in MOMENT_DTYPES, f"one of {', '.join(MOMENT_DTYPES)}"),
        ("warmup", warmup, 0 <= warmup <= 1, "a share of training, 0 to 1"),
        ("lr", lr, lr > 0, "more than 0"),
    ):
        if not holds:
            raise UsageError(f"config.optim.{name} is {value!r}; expected {expected}")
    warmup_steps = round(warmup * total_steps)
    schedule = warmup_cosine(lr, min_lr, warmup_steps, total_steps)
    # lr·rel·(update + decay/lr·p) = rel·(lr·update + decay·p): one chain serves both rules.
    decay = weight_decay if decay_rule == "lr" else weight_decay / lr
    tx = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        _scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(mu_dtype)),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(schedule),
    )
    return (_multiplied(tx, multipliers) if multipliers else tx), schedule


def factors(params: Any, multipliers: Multipliers) -> Any:
    """The factor on each parameter's learning rate, a tree of floats; 0 freezes the parameter.

    Args:
        multipliers: (regex, factor) pairs. The first whose regex matches a part of a parameter's
            path, such as "/blocks_0/position", counts; without one the factor is 1.

    Raises:
        UsageError: a regex is invalid or decides for no parameter, a factor is negative or not
            finite, or nothing is left to train.
    """
    table = patterns(multipliers)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = ["/" + jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    rows = [
        next((row for row, (pattern, _) in enumerate(table) if pattern.search(path)), None)
        for path in paths
    ]
    for row, (pattern, _) in enumerate(table):
        if row not in rows:
            some = ", ".join(dict.fromkeys(re.sub(r"\d+", "0", path) for path in paths))
            raise UsageError(
                f"config.optim.multipliers has {pattern.pattern!r}, which is the first to match no "
                f"parameter; expected a regex for some of: {some}"
            )
    values = [1.0 if row is None else table[row][1] for row in rows]
    if not any(values):
        raise UsageError("config.optim.multipliers freezes every parameter; leave some to train")
    return jax.tree.unflatten(jax.tree.structure(params), values)


def patterns(multipliers: Multipliers) -> list[tuple[re.Pattern, float]]:
    """The regexes and factors, which are checked without any parameters, see `factors`."""
    return [_checked(pair) for pair in multipliers]


def _checked(pair: Any) -> tuple[re.Pattern, float]:
    try:
        regex, factor = pair
        pattern, factor = re.compile(regex), float(factor)
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"the factor is {factor:g}")
    except (TypeError, ValueError, re.error) as error:
        raise UsageError(
            f"config.optim.multipliers has {pair!r}, which is no regex with a factor of 0, which "
            f"freezes, or above ({error}); expected pairs, such as (('position', 0.1), "
            "('proj_in', 0))"
        ) from error
    return pattern, factor


def _multiplied(
    tx: optax.GradientTransformation, multipliers: Multipliers
) -> optax.GradientTransformation:
    def labels(params):
        return jax.tree.map(lambda f: "trained" if f else "frozen", factors(params, multipliers))

    def multiply(updates, _):
        return jax.tree.map(jnp.multiply, updates, factors(updates, multipliers))

    parts = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(parts, optax.stateless(multiply))


def _scale_by_adam(
    *, b1: float, b2: float, eps: float, mu_dtype: jnp.dtype
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with the arithmetic of a narrow first moment spelled out.

    In b1·m both b1 (0.9 to 0.8984 in bfloat16) and the product are rounded. In a compiled step XLA
    may leave the second rounding out, as it does on the CPU; the published recipe has it.
    """
    precision = jnp.finfo(mu_dtype)
    decay = float(jnp.asarray(b1, mu_dtype))
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    def update(updates, state, params=None):
        def first_moment(gradient, old):
            old = decay * old.astype(gradient.dtype)
            rounded = jax.lax.reduce_precision(old, precision.nexp, precision.nmant)
            return (1 - b1) * gradient + rounded

        mu = jax.tree.map(first_moment, updates, state.mu)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        scaled = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return scaled, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(adam.init, update)
