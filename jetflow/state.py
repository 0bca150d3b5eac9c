"""What training carries from step to step, and what a checkpoint holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jetflow.flows.stack import Stack
from jetflow.noise import Purpose, key_for


class TrainState(flax.struct.PyTreeNode):
    """The whole state of a training run; `step` is its only clock.

    Attributes:
        step: int32, the number of updates made.
        params: trained by gradient.
        collections: the flow's other variables: `constants`, and `prior` where it is learned.
        opt_state: of the optimizer.
        ema: moving average of the parameters, or None.
    """

    step: Any
    params: Any
    collections: Any
    opt_state: Any
    ema: Any

    def variables(self) -> dict[str, Any]:
        """The flow's variables, with the averaged parameters where there are any."""
        return {"params": self.params if self.ema is None else self.ema, **self.collections}


def create(
    flow: Stack, tx: optax.GradientTransformation, *, seed: int, use_ema: bool
) -> TrainState:
    """The state before the first step. Pure, so that it can be traced for shapes and shardings."""
    image = jnp.zeros((1, *flow.image_shape))
    label = jnp.zeros((1,), jnp.int32) if flow.num_classes else None
    variables = dict(flow.init(key_for(seed, 0, Purpose.INIT), image, label))
    params = variables.pop("params")
    variables.pop("intermediates", None)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=variables,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
    )
