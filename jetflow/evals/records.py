"""What every result says of itself, in its JSON and to a person."""

import math
from collections.abc import Mapping
from typing import Any

from jetflow.data.pipeline import Dataset


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Which images a result is of."""
    return {
        "name": dataset.name,
        "version": dataset.version,
        "split": dataset.split,
        "examples": len(dataset),
        "checksum": dataset.checksum(),
    }


def finite(value: float) -> float | None:
    """The value for JSON, which has no nan."""
    return float(value) if math.isfinite(value) else None


def number(result: Mapping[str, Any]) -> str:
    """The value of a result with its standard error, where it has one: 3.0890 ± 0.0003."""
    value, error = result["value"], result["standard_error"]
    text = "not finite" if value is None else f"{value:.4f}"
    return text + ("" if error is None else f" ± {error:.2g}")
