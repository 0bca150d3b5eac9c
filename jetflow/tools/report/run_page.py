"""The values of a run's page, and those that it shares with a sweep's."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jetflow.buckets import AnyPath, resolved
from jetflow.fields import flat
from jetflow.files import METRICS, scan_json, scan_metrics
from jetflow.pictures import MOST_ROWS
from jetflow.training.step import abstract_variables
from jetflow.types import UsageError
from jetflow.workdir import EVALUATION, read_flow, scan_environments

POINTS = 250  # of a curve; a longer one is drawn as the means of so many stretches
PICTURES = 8  # sample grids, from the first to the last
DATA_FIELDS = ("name", "version", "split", "examples", "resize", "checksum")
# Fields of an evaluation that are in columns or sections of their own.
SHOWN = ("metric", "value", "standard_error", "step", "weights", "data", "parts", "reference",
         "network", "train_data")  # fmt: skip


def run_page(workdir: AnyPath) -> dict[str, Any]:
    """The values of the page of a run, also of one that has not ended.

    Raises:
        UsageError: if there is no run.
    """
    config, flow, _ = read_flow(workdir)
    metrics, damaged = scan_metrics(workdir / METRICS)
    results, wrong = scan_json(sorted((workdir / "evals").glob("*.json")), EVALUATION)
    environments, also_wrong = scan_environments(workdir)
    damaged += wrong + also_wrong
    if not metrics and not results and not damaged:
        raise UsageError(f"the run in {workdir} has neither metrics nor evaluations yet; train it")
    results.sort(key=lambda result: (-result["step"], result["metric"]))
    parameters = jax.tree.leaves(abstract_variables(flow)["params"])
    names = list(dict.fromkeys(name for line in metrics for name in line))
    pictures = sorted((workdir / "samples").glob("step_*.png"))
    grids = [path for path in pictures if path.stem[5:].isdecimal() and path.is_file()]
    chosen = (
        np.unique(np.linspace(0, len(grids) - 1, PICTURES).round().astype(int)) if grids else []
    )
    return dict(
        kind="run",
        title=f"Run {resolved(workdir).name}",
        damaged=damaged,
        parameters=sum(math.prod(leaf.shape) for leaf in parameters),
        step=max((line["step"] for line in metrics), default=None),
        evaluations=[_evaluation(result) for result in results],
        lines={name: _line(metrics, name) for name in names},
        main=next((name for name in ("bpd", "noised_bpd", "density_bpd") if name in names), "bpd"),
        grids=[(grids[i], int(grids[i].stem.removeprefix("step_"))) for i in chosen],
        num_grids=len(grids),
        most_rows=MOST_ROWS,
        fields=[*flat(config, "").items()],
        environments=side_by_side(
            {f"from step {one.pop('from_step'):,}": one for one in environments}
        ),
        data=[names, *([line.get(name) for name in names] for line in metrics)],
        **described(config, results),
    )


def described(config: dict[str, Any] | None, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A config with the fields that differ from its defaults, and the data sets and networks of
    evaluations."""
    fields = flat(config or {}, "")
    defaults = config and config["resolved"].get("defaults")
    sources = [*results, *(result["reference"] for result in results if "reference" in result)]
    sets = [source.get(key) for source in sources for key in ("data", "train_data")]
    rows = [tuple(str(one.get(name, "–")) for name in DATA_FIELDS) for one in sets if one]
    networks = [result["network"] for result in results if "network" in result]
    return dict(
        config=config,
        changes=defaults and [(name, old, fields.get(name)) for name, old in defaults.items()],
        data_fields=DATA_FIELDS,
        sets=[*dict.fromkeys(rows)],
        networks={one["weights_sha256"][:8]: one["published_weights"] for one in networks},
    )


def side_by_side(columns: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """A table of named dicts, a column each; None without any."""
    names = dict.fromkeys(itertools.chain.from_iterable(columns.values()))
    rows = [(name, *(column.get(name) for column in columns.values())) for name in names]
    return dict(header=["", *columns], rows=rows) if columns else None


def _evaluation(result: dict[str, Any]) -> dict[str, Any]:
    """A record with its data, and with all that it says of how it was measured, as settings."""
    data = result.get("data") or result.get("reference", {}).get("data") or {}
    rest = flat({name: value for name, value in result.items() if name not in SHOWN}, "")
    settings = {name: value for name, value in rest.items() if value not in (None, "", [])}
    names = [str(data[key]) for key in DATA_FIELDS[:3] if key in data]
    return {**result, "where": " ".join(names), "settings": settings}


def _line(metrics: list[dict[str, Any]], name: str) -> list[tuple[int | float, int | float]]:
    """The curve of a metric; of a long one, means over stretches of equal length."""
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(np.mean(part, axis=0).tolist()) for part in parts]
