"""The least time of a step by the roofline, and what all steps come to: days, chip-hours, money."""

import dataclasses

from jetflow.tools.plan import costs
from jetflow.tools.plan.devices import Accelerator

SHARES = (1.0, 0.5)  # of the roofline's speed


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all steps take at a share of the roofline's speed; at a share of 1, at least."""

    share: float
    days: float
    chip_hours: float  # of TPU chips, or of GPUs
    cost: float | None  # in the currency of the price


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The least time of a step by the roofline.

    The resources are compute (matrix products, each at the peak of its dtype and precision), hbm
    (bytes to and from memory), links (exchanges within a slice or a node, over all links) and
    network (exchanges between slices or nodes).
    """

    seconds_by_resource: dict[str, float]
    bound_by: str  # the scarcest resource
    step_seconds: float  # by that resource
    images_per_second: float  # at most
    peak_share: float  # of bfloat16's peak, by the FLOPs of the formula: at most
    budgets: tuple[Budget, ...]  # for each of `SHARES`


def estimate(
    cost: costs.Cost,
    accelerator: Accelerator,
    model_flops: float,
    batch_size: int,
    steps: int,
    chips: int,
    price: float | None,
) -> Estimate:
    """The roofline of a step that costs so much on each device; `price` is that of a chip-hour."""
    between = sum(one.bytes for one in cost.collectives if one.kind.endswith(costs.BETWEEN))
    sent = sum(one.bytes for one in cost.collectives)
    computed = cost.flops_by_arithmetic.items()
    seconds = {
        "compute": sum(flops / accelerator.peak(arithmetic) for arithmetic, flops in computed),
        "hbm": cost.hbm_bytes / accelerator.hbm_bandwidth,
        "links": (sent - between) / accelerator.link_bandwidth,
        "network": between / accelerator.network_bandwidth,
    }
    bound_by = max(seconds, key=seconds.__getitem__)
    least = seconds[bound_by]
    return Estimate(
        seconds_by_resource=seconds,
        bound_by=bound_by,
        step_seconds=least,
        images_per_second=batch_size / least,
        peak_share=model_flops / least / accelerator.flops,
        budgets=tuple(_budget(share, steps * least, chips, price) for share in SHARES),
    )


def _budget(share: float, seconds: float, chips: int, price: float | None) -> Budget:
    hours = seconds / share / 3600
    chip_hours = chips * hours
    return Budget(share, hours / 24, chip_hours, None if price is None else price * chip_hours)
