"""What training carries from step to step, and what a checkpoint holds."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jetflow.noise import Purpose, key_for
from jetflow.types import Flow


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


def create(flow: Flow, tx: optax.GradientTransformation, *, seed: int, use_ema: bool) -> TrainState:
    """The state before the first step. Pure, so that it can be traced for shapes and shardings."""
    variables = init_variables(flow, key_for(seed, 0, Purpose.INIT))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=variables,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
    )


def abstract_variables(flow: Flow) -> dict[str, Any]:
    """The shapes and types of a flow's variables."""
    return jax.eval_shape(functools.partial(init_variables, flow), jax.random.key(0))


def init_variables(flow: Flow, key: Key[Array, ""]) -> dict[str, Any]:
    """The variables of a flow before its training."""
    image = jnp.zeros((1, *flow.image_shape))
    label = jnp.zeros((1,), jnp.int32) if flow.num_classes else None
    return dict(flow.init(key, image, label))
