"""Points of a sweep that repeat one measurement, such as those of several seeds, as one point."""

import statistics
from collections.abc import Sequence
from typing import Any


def merged(
    points: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], repeats: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Points and records with those that differ in `repeats` alone as one.

    Its metrics are the means of those that were measured, and its errors their standard deviations;
    one value has none. The picture is that of the first.
    """
    groups: dict[str, list[int]] = {}
    shared = []
    for index, point in enumerate(points):
        rest = {name: choice for name, choice in point.items() if name not in repeats}
        labels = str([(name, choice["label"]) for name, choice in rest.items()])
        if labels not in groups:
            shared.append(rest)
        groups.setdefault(labels, []).append(index)
    known = {record["number"]: record for record in records}
    found = [[known[i] for i in group if i in known] for group in groups.values()]
    sizes = [len(group) for group in groups.values()]
    return shared, [
        _record(number, some, size)
        for number, (some, size) in enumerate(zip(found, sizes, strict=True))
        if some
    ]


def _record(number: int, records: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    done = [record for record in records if record["status"] == "done"]
    names = dict.fromkeys(name for record in done for name in record["metrics"])
    metrics: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    for name in names:
        values = [value for r in done if (value := r["metrics"].get(name)) is not None]
        metrics[name] = statistics.fmean(values) if values else None
        errors[name] = statistics.stdev(values) if len(values) > 1 else None
    first = (done or records)[0]
    return {
        "number": number,
        "name": first["name"],
        "status": "done" if len(done) == repeats else f"{len(done)} of {repeats} done",
        "metrics": metrics,
        "errors": errors,
        **{name: first[name] for name in ("parameters", "step") if name in first},
    }
