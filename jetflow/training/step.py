"""The training state, and the pure training step."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from jetflow import likelihood, optim
from jetflow.noise import Noise, Purpose, key_for
from jetflow.types import Batch, Condition, Flow

PRIOR_RATE = 0.1

Metrics = dict[str, Float[Array, ""]]


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


def abstract_variables(flow: Flow) -> dict[str, Any]:
    """The shapes and types of a flow's variables."""
    return jax.eval_shape(functools.partial(init_variables, flow), jax.random.key(0))


def init_variables(flow: Flow, key: Key[Array, ""]) -> dict[str, Any]:
    """The variables of a flow before its training."""
    image = jnp.zeros((1, *flow.image_shape))
    label = jnp.zeros((1,), jnp.int32) if flow.num_classes else None
    level = jnp.ones((1,)) if flow.noise_conditional else None
    return dict(flow.init(key, image, label, level))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything of a training step that is not data: the flow and how it is trained.

    Attributes:
        flow: the model.
        tx, schedule: the optimizer, and its learning rate by step.
        noise: what is done to images and labels.
        seed: of all the draws.
        accumulation: parts that a batch is cut into; gradients are averaged over them.
        ema_decay: of the moving average of the parameters; 0 for none.
        multipliers: as `tx` has them; a parameter of factor 0, and its average, stay bit for bit.
    """

    flow: Flow
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    noise: Noise
    seed: int
    accumulation: int = 1
    ema_decay: float = 0.0
    multipliers: optim.Multipliers = ()

    def first_state(self) -> TrainState:
        """The state before the first step, which can be traced for its shapes alone."""
        variables = init_variables(self.flow, key_for(self.seed, 0, Purpose.INIT))
        params = variables.pop("params")
        ema = jax.tree.map(jnp.copy, params) if self.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, variables, self.tx.init(params), ema)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update from a global batch of uint8 images, with its noise."""
        x, condition = self.noise.augment(
            batch.image,
            batch.label,
            seed=self.seed,
            step=state.step,
            pixel_scale=self.flow.pixel_scale,
        )
        return self.update(state, x, condition)

    def update(
        self, state: TrainState, x: Float[Array, "B *X"], condition: Condition
    ) -> tuple[TrainState, Metrics]:
        """One update from pixel values to which the noise has been added."""
        gradients, aux = self._gradients(state, x, condition)
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        trained = jax.tree.map(bool, optim.factors(state.params, self.multipliers))
        params = _where(trained, optax.apply_updates(state.params, updates), state.params)
        average = _average(state.ema, params, self.ema_decay)
        metrics = aux["metrics"] | {
            "gradient_norm": _norm(trained, gradients),
            "learning_rate": self.schedule(state.step),
        }
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            collections=_update_prior(state.collections, aux["square"]),
            opt_state=opt_state,
            ema=None if average is None else _where(trained, average, state.ema),
        )
        return new_state, metrics

    def _gradients(self, state, x, condition):
        """Gradient and metrics of the batch, averaged over `accumulation` parts of it."""
        gradient = jax.grad(loss, has_aux=True, argnums=1)

        def part(x, condition, weights):
            return gradient(self.flow, state.params, state.collections, x, condition, weights)

        batch = x, condition, self.noise.weights(condition.noise_level)
        if self.accumulation == 1:
            return part(*batch)

        def body(total, inputs):
            return jax.tree.map(jnp.add, total, part(*inputs)), None

        # Row r goes to part r % accumulation, so that each part has rows of every device.
        parts = jax.tree.map(
            lambda a: a.reshape(-1, self.accumulation, *a.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, *first))
        total, _ = jax.lax.scan(body, zeros, parts)
        return jax.tree.map(lambda a: a / self.accumulation, total)


def loss(
    flow: Flow,
    params: Any,
    collections: Mapping[str, Any],
    x: Float[Array, "B *X"],
    condition: Condition,
    weights: Float[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The objective, bits per dimension under a standard normal prior, and metrics to log.

    A learned prior variance is no part of the objective: it follows the latents, as in
    the published TarFlow, see `_update_prior`. It is part of the metric `bpd`, as in evaluation;
    the objective is then a metric of its own. So it is with weights of the images.
    """
    variables = {"params": params, **collections}
    z, logdet, _, scales = flow.apply(variables, x, *condition, method="forward_blocks")
    prior = likelihood.bits_per_dim(likelihood.prior_nll(z), z).mean()
    volume = likelihood.bits_per_dim(-logdet, z).mean()
    objective, metrics = prior + volume, {}
    if weights is not None:
        bits = likelihood.bits_per_dim(likelihood.nll(z, logdet), z)
        objective = metrics["objective"] = (weights * bits).mean()
    if "prior" in collections:
        variance = likelihood.prior_variance(collections)
        prior = likelihood.bits_per_dim(likelihood.prior_nll(z, variance), z).mean()
        metrics["objective"] = objective
    metrics |= {"bpd": prior + volume, "bpd_prior": prior, "bpd_logdet": volume}
    metrics |= {f"output_scale/{block:02d}": scale for block, scale in enumerate(scales)}
    if flow.logdet_cap is not None:
        metrics["logdet_cap_share"] = (logdet.mean() - flow.pixel_logdet) / flow.logdet_cap
    return objective, {"metrics": metrics, "square": jnp.mean(z**2, axis=0)}


def _update_prior(collections: Mapping[str, Any], square: Float[Array, "T D"]) -> dict[str, Any]:
    """Move a learned prior variance towards the latents' mean square by `PRIOR_RATE`."""
    if "prior" not in collections:
        return dict(collections)
    variance = collections["prior"]["variance"]
    moved = variance + PRIOR_RATE * (square - variance)
    return {**collections, "prior": {"variance": moved}}


def _where(trained: Any, new: Any, old: Any) -> Any:
    """The new arrays of what is trained, the old ones of the rest."""
    return jax.tree.map(lambda is_trained, n, o: n if is_trained else o, trained, new, old)


def _norm(trained: Any, gradients: Any) -> Float[Array, ""]:
    """The norm of the gradient of what is trained, as far as the optimizer clips it."""
    leaves = zip(jax.tree.leaves(trained), jax.tree.leaves(gradients), strict=True)
    return optax.global_norm([gradient for is_trained, gradient in leaves if is_trained])


def _average(ema: Any, params: Any, decay: float) -> Any:
    if ema is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
