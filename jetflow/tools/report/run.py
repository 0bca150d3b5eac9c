"""The page of a run: curves, samples, evaluations, config, data and environment."""

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax

from jetflow.files import METRICS, read_metrics
from jetflow.pictures import MOST_ROWS
from jetflow.tools.report.content import (
    Block,
    Cell,
    Gallery,
    Lines,
    Number,
    Page,
    Prose,
    Section,
    Series,
    Table,
    number,
)  # fmt: skip
from jetflow.training.step import abstract_variables
from jetflow.types import UsageError
from jetflow.workdir import flat, read_environments, read_flow

POINTS = 250  # of a curve; of a longer one, so many means are drawn
PICTURES = 8  # sample grids, from the first to the last
# Of an evaluation, what is no setting, or is in the name of its file where it is not by default.
NO_SETTINGS = ("metric", "value", "standard_error", "step", "weights", "data", "file",
               "parts", "importance_weighted", "samples", "reference", "network",
               "train_data")  # fmt: skip


def run_page(workdir: Path) -> Page:
    """What there is in the workdir of a run, also of one that has not ended.

    Raises:
        UsageError: if there is no run.
    """
    config, flow, _ = read_flow(workdir)
    metrics = read_metrics(workdir / METRICS)
    if not metrics and not (workdir / "evals").exists():
        raise UsageError(f"the run in {workdir} has neither metrics nor evaluations yet; train it")
    parameters = jax.tree.leaves(abstract_variables(flow)["params"])
    count = sum(math.prod(leaf.shape) for leaf in parameters)
    step = max((line["step"] for line in metrics), default=None)
    done = "" if step is None else f", {step:,} of {config['resolved']['total_steps']:,} steps"
    data = config["data"]["name"] or "no data set"
    sections = [
        Section("Evaluations", _evaluations(read_evaluations(workdir))),
        Section("Training", [*_curves(metrics)]),
        Section("Samples", _samples(workdir)),
        Section("Config", config_blocks(config)),
        Section("Data", data_blocks(config, read_evaluations(workdir))),
        Section("Environment", environment_blocks(workdir)),
        Section("Whole config", [whole_config(config)], folded=True),
    ]
    return Page(
        title=f"Run {workdir.resolve().name}",
        summary=f"{config['flow']['kind']} with {count:,} parameters on {data}{done}",
        sections=[section for section in sections if section.blocks],
        data=_metrics_table(metrics),
    )


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """What each evaluation found, by step and metric."""
    paths = sorted((workdir / "evals").glob("*.json"))
    results = [json.loads(path.read_text()) | {"file": path.stem} for path in paths]
    results = [result for result in results if {"metric", "value", "step"} <= result.keys()]
    return sorted(results, key=lambda result: (-result["step"], result["metric"]))


def _evaluations(results: list[dict[str, Any]]) -> list[Block]:
    if not results:
        return []
    rows = []
    for result in results:
        rest = {key: value for key, value in result.items() if key not in NO_SETTINGS}
        given = unquote(result["file"].removeprefix(f"{result['metric']}-{result['step']:08d}"))
        rest |= {"weights": "averaged"} if result.get("weights") == "ema" else {}
        if result.get("importance_weighted") is not None:
            rest |= {"importance-weighted": result["importance_weighted"]}
        if "reference" in result:
            rest |= {"samples": result["samples"]["images"]}
        rows.append(
            (
                result["metric"],
                *(_cell(result.get(key)) for key in ("value", "standard_error", "step")),
                _compared_with(result),
                ", ".join(filter(None, [given[1:].replace(",", ", "), _settings(rest)])),
            )
        )
    header = ("metric", "value", "±", "step", "data", "settings")
    caption = (
        "± is the standard error. Bits per dimension, distances and errors are better when lower. "
        "A bpd is comparable with others of the same data, version and split only; a noised_bpd "
        "also depends on the noise."
    )
    return [Table(header, rows, caption), *network_blocks(results)]


def _compared_with(result: dict[str, Any]) -> str:
    """The data of a likelihood, or that of the reference of a distance."""
    data = result.get("data") or result.get("reference", {}).get("data") or {}
    return " ".join(str(data[key]) for key in ("name", "version", "split") if key in data)


def _curves(metrics: list[dict[str, Any]]) -> Iterator[Block]:
    names = list(dict.fromkeys(name for line in metrics for name in line if name != "step"))
    main = next((name for name in ("bpd", "noised_bpd") if name in names), "bpd")
    found = {name: _points(metrics, name) for name in names}

    def plot(title, y, chosen: dict[str, str], caption, **options) -> Iterator[Lines]:
        series = [Series(text, found[name]) for name, text in chosen.items() if found.get(name)]
        if series:
            yield Lines(title, "step", y, series, caption, **options)

    held_out = {f"test_{name}": f"held-out {name}" for name in ("bpd", "noised_bpd")}
    held_out = {name: text for name, text in held_out.items() if name in found}
    yield from plot(
        "Likelihood", "bits per dimension", {main: f"training {main}", **held_out},
        "Lower is better. A gap that widens between training and held-out is overfitting; where "
        "parameters are averaged, the held-out figures are those of the averages.",
    )  # fmt: skip
    parts = {f"{main}_prior": "prior", f"{main}_logdet": "log-determinant", main: "sum"}
    yield from plot(
        "Parts of the likelihood", "bits per dimension", parts,
        "What the prior costs, and what the volume change costs (or, below 0, gains).",
    )  # fmt: skip
    yield from plot(
        "Gradient norm", "norm", {"gradient_norm": "gradient_norm"},
        "Before it is clipped; spikes are batches that moved the parameters far.", log_y=True,
    )  # fmt: skip
    yield from plot("Learning rate", "rate", {"learning_rate": "learning_rate"}, "")
    yield from plot(
        "Throughput", "images per second", {"images_per_second": "images_per_second"},
        "Without the time of evaluations, pictures and checkpoints.",
    )  # fmt: skip
    scales = {name: f"block {int(name[-2:])}" for name in names if name.startswith("output_scale/")}
    yield from plot(
        "Output scale of the blocks", "root mean square", scales,
        "The last block's is to come to 1, the prior's. One that grows without end diverges.",
    )  # fmt: skip
    yield from plot(
        "Share of the log-determinant's cap", "share", {"logdet_cap_share": "logdet_cap_share"},
        "Near 1 the couplings cannot expand further: more of them would help.",
    )  # fmt: skip


def _points(metrics: list[dict[str, Any]], name: str) -> list[tuple[Number, Number]]:
    """The curve of a metric; of a long one, means over stretches of equal length."""
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return [(mean([x for x, _ in part]), mean([y for _, y in part])) for part in parts]


def _samples(workdir: Path) -> list[Block]:
    paths = sorted((workdir / "samples").glob("step_*.png"))
    if not paths:
        return []
    last = len(paths) - 1
    chosen = sorted({round(i * last / (PICTURES - 1)) for i in range(PICTURES)})
    pictures = [(paths[i], f"step {int(paths[i].stem.removeprefix('step_')):,}") for i in chosen]
    caption = "The same prior noise at every step; "
    caption += f"one row a class where there are {MOST_ROWS} or fewer."
    more = f" {len(paths)} grids are in {workdir.name}/samples." if len(paths) > len(chosen) else ""
    return [Prose(caption + more), Gallery(pictures)]


def config_blocks(config: dict[str, Any], without: Sequence[str] = ()) -> list[Block]:
    """What the config changes of the defaults, where these can be found, but for some fields."""
    base = _defaults(config["flow"]["kind"])
    if base is None:
        return [Prose("configs/base.py was not found, so the whole config is below.")]
    mine = flat({name: config[name] for name in config if name != "resolved"})
    rows = [
        (name.removeprefix("config."), _text(base.get(name)), _text(value))
        for name, value in mine.items()
        if base.get(name) != value and name not in without
    ]
    caption = "What differs from the defaults of configs/base.py; its comments say what each is."
    return [Table(("field", "default", "here"), rows, caption)]


def _defaults(kind: str) -> dict[str, Any] | None:
    """The flat base config of a flow, from the clone that jetflow is installed from."""
    path = Path(__file__).parents[2] / "configs" / "base.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("_jetflow_base", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return flat(json.loads(json.dumps(getattr(module, kind)().to_dict())))


def data_blocks(config: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[Block]:
    """The data sets with their checksums, of the training split and of all that was evaluated."""
    section, resolved = config["data"], config["resolved"]
    sources = [*results, *(result["reference"] for result in results if "reference" in result)]
    facts = [source.get(key) for source in sources for key in ("data", "train_data")]
    facts = [fact for fact in facts if isinstance(fact, dict)]
    keys = ("name", "version", "split", "examples", "resize", "checksum")
    rows = dict.fromkeys(tuple(_cell(fact.get(key)) for key in keys) for fact in facts)
    trained = (section["name"], resolved.get("data_version"), section["train_split"])
    shape = "×".join(map(str, resolved["image_shape"]))
    labels = f"{resolved['num_classes']} classes" if resolved["num_classes"] else "no labels used"
    name = " ".join(str(part) for part in trained if part)
    text = f"Trained on {name}: images of {shape}, {labels}."
    caption = "The checksum is over all pixels and labels of the split, in their order."
    table = [Table(keys, list(rows), caption)] if rows else []
    return [Prose(text), *table]


def network_blocks(results: Sequence[dict[str, Any]]) -> list[Block]:
    """By which network samples were compared with real images."""
    networks = dict.fromkeys(
        (facts["weights_sha256"], facts["published_weights"])
        for facts in (result["network"] for result in results if "network" in result)
    )
    return [
        Prose(f"Samples were compared by the Inception network of SHA-256 {sha256[:8]}…, "
              + ("the published one." if published else "not the published one: these distances "
                 "are comparable with each other, and with no published figure."))
        for sha256, published in networks
    ]  # fmt: skip


def environment_blocks(workdir: Path) -> list[Block]:
    """What the run computed with, a column for each environment."""
    known = read_environments(workdir)
    if not known:
        return [Prose("The run noted no environment: it was converted, or has not begun.")]
    names = list(dict.fromkeys(name for one in known for name in one if name != "from_step"))
    header = ["", *(f"from step {one['from_step']:,}" for one in known)]
    return [Table(header, [(name, *(_text(one.get(name)) for one in known)) for name in names])]


def whole_config(config: dict[str, Any]) -> Table:
    fields = flat(config, "")
    return Table(("field", "value"), [(name[1:], _text(value)) for name, value in fields.items()])


def _metrics_table(metrics: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for line in metrics for name in line))
    return Table(names, [[line.get(name) for name in names] for line in metrics])


def _settings(tree: dict[str, Any]) -> str:
    """Scalars of a result as "draws 4, noise.kind uniform"; None and empty ones are left out."""
    values = {name[1:]: value for name, value in flat(tree, "").items()}
    return ", ".join(
        f"{name} {_text(value)}" for name, value in values.items() if value not in (None, "", [])
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return f"({', '.join(map(_text, value))})"
    return "–" if value is None else str(value)


def _cell(value: Any) -> Cell:
    return value if isinstance(value, str | int | float | bool | None) else _text(value)
