"""The first state of a training from another run's weights, by a plan of `transfer_plan`."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jetflow import manifest, sharding
from jetflow import workdir as workdirs
from jetflow.checkpoint import Checkpoints
from jetflow.flows import splits as orders
from jetflow.training import resample
from jetflow.training.state import TrainState, abstract_variables
from jetflow.training.transfer_plan import Fate, Side, Source
from jetflow.types import UsageError

WEIGHTS = ("auto", "ema", "params")


def open_source(workdir: Path, weights: str) -> Source:
    """The run in `workdir`, and which of its weights to take.

    Args:
        weights: one of `WEIGHTS`; "auto" takes averaged ones where there are any.

    Raises:
        UsageError: if there is no run, or it has no such weights.
    """
    if weights not in WEIGHTS:
        raise UsageError(
            f"config.init_weights is {weights!r}; expected one of {', '.join(WEIGHTS)}"
        )
    config, flow, best = workdirs.read_flow(workdir, dtype="float32")
    if weights == "ema" and best != "ema":
        raise UsageError(
            "config.init_weights is 'ema', but that run has no averaged weights; set it to 'auto'"
        )
    return Source(
        flow=flow,
        section=config["flow"],
        data=config["data"]["name"],
        abstract=abstract_variables(flow),
        workdir=workdir,
        weights=best if weights == "auto" else weights,
    )


def restore(source: Source, mesh: Mesh, rules: Any) -> tuple[dict[str, Any], int]:
    """The source's variables, and the step that they come from.

    Parameters lie on the mesh as those of a training; the others, which are small, are whole on
    every device.

    Raises:
        UsageError: if there is no sound checkpoint.
    """
    abstract = dict(source.abstract)
    params = {"params": abstract.pop("params")}
    shardings = sharding.state_shardings(mesh, params, rules)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), abstract)
    place = functools.partial(
        jax.tree.map, lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    )
    wanted = {
        source.weights: place(params, shardings)["params"],
        "collections": place(abstract, whole),
    }
    with Checkpoints(source.workdir / "checkpoints") as checkpoints:
        restored, step = checkpoints.restore(wanted)
    return {"params": restored[source.weights], **restored["collections"]}, step


def initialiser(
    plan: Mapping[str, Fate],
    source: Source,
    target: Side,
    taken: Mapping[str, Any],
    create: Callable[[], TrainState],
) -> Callable[[Mapping[str, Any]], TrainState]:
    """A pure function of what `restore` gave: `create()`, with that as its variables.

    The optimizer and the step are fresh; averages start from the parameters.

    Raises:
        UsageError: if the splits of a Jet have patterns that are not known for another grid.
    """
    resampled = any(fate.fate == "resampled" for fate in plan.values())
    weights = _token_weights(source, target, taken) if resampled else []

    def initial(taken: Mapping[str, Any]) -> TrainState:
        state = create()
        fresh = {"params": state.params, **state.collections}
        old = manifest.flatten(dict(taken))
        choices = {
            "loaded": lambda path, _: old[path],
            "resampled": lambda path, _: resample.tables(old[path], weights),
            "fresh": lambda _, array: array,
        }
        flat = manifest.flatten(fresh)
        chosen = [choices[plan[path].fate](path, array) for path, array in flat.items()]
        collections = jax.tree.unflatten(jax.tree.structure(fresh), chosen)
        params = collections.pop("params")
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state.replace(params=params, collections=collections, ema=ema)

    return initial


def _token_weights(
    source: Source, target: Side, taken: Mapping[str, Any]
) -> list[Float[np.ndarray, "N T"]]:
    """The weights that resample a table with a row for each token: of a Jet, of each coupling's."""
    there, here = source.grid, target.grid
    if source.section["kind"] != "jet":
        return [resample.in_image_order(there, here)]
    couplings, kinds = source.section["num_couplings"], tuple(source.section["kinds"])
    expected = orders.splits(couplings, kinds, there, source.flow.latent_shape[1])
    stored = np.asarray(taken["constants"]["blocks_0"]["token_order"])
    if not np.array_equal(stored, expected.token_order):
        raise UsageError(
            "its constants/blocks_0/token_order are not the patterns of its config.flow.kinds, so "
            f"they cannot be had on {here[0]}x{here[1]} tokens; set what gives "
            f"{there[0]}x{there[1]}"
        )
    patterns = orders.layer_patterns(couplings, kinds)
    weights = {
        pattern: resample.on_spatial_split(pattern, there, here)
        if pattern
        else resample.in_image_order(there, here)
        for pattern in set(patterns)
    }
    return [weights[pattern] for pattern in patterns]
