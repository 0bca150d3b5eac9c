"""The record of a result, which is written as JSON, and the line that a person reads of it."""

import math
from collections.abc import Mapping
from typing import Any


def record(metric: str, value: float, error: float | None, **facts: Any) -> dict[str, Any]:
    """A number with its standard error and all that it depends on."""
    errors = {"standard_error": finite(error)}
    return {"metric": metric, "value": finite(value), **errors, **facts}


def finite(value: float | None) -> float | None:
    """The value for JSON, which has no nan."""
    return None if value is None or not math.isfinite(value) else float(value)


def describe(result: Mapping[str, Any]) -> str:
    """A record for a person: the value, its standard error, and what it depends on."""
    metric, error = result["metric"], result["standard_error"]
    if metric.endswith("_gap"):
        context = _describe_gap(result)
    elif metric.endswith("bpd"):
        context = _describe_likelihood(result)
    elif "accuracy" in metric:
        context = _describe_accuracy(result)
    else:
        context = _describe_distance(result)
    uncertainty = "" if error is None else f" ± {error:.2g}"
    return f"{metric} {_number(result['value'])}{uncertainty} {context}"


def _describe_likelihood(result: Mapping[str, Any]) -> str:
    draws, noise = result["draws"], result["noise"]
    one = "no noise" if noise["kind"] == "none" else "1 noise draw"
    notes = f"standard error over {draws} noise draws" if draws > 1 else one
    notes += ", averaged weights" if result["weights"] == "ema" else ""
    notes += ", given the labels" if result["conditional"] else ""
    text = f"({notes}) on {_data(result['data'])}"
    if noise["kind"] == "uniform":
        return text
    if noise["kind"] == "none":
        return f"{text}\n  (of a density of arrays, in their units: not comparable with images)"
    return (
        f"{text}\n  (of data with gaussian noise of std {_std(noise)} added: not comparable with a "
        "bpd of dequantised images)"
    )


def _std(noise: Mapping[str, Any]) -> str:
    """Of gaussian noise: one, or from the least level to the largest."""
    least, largest = noise.get("t0", noise["std"]), noise.get("t1", noise["std"])
    return f"{least:g}" if least == largest else f"{least:g} to {largest:g}"


def _describe_gap(result: Mapping[str, Any]) -> str:
    held_out, train = _number(result["held_out"]), _number(result["train"])
    return (
        f"(standard error over images): {held_out} on {_data(result['data'])}; {train} on "
        f"{_data(result['train_data'])}"
    )


def _describe_accuracy(result: Mapping[str, Any]) -> str:
    rule = "the gradient" if result["metric"].endswith("gradient") else "p(x | y)"
    is_drawn = "samples" in result
    source = f"{result['samples']['images']:,} samples" if is_drawn else _data(result["data"])
    text = (
        f"(standard error over {source}), by {rule} of images with {result['noise']['kind']} "
        f"noise, mean of {result['draws']} draws"
    )
    if "agreement" in result:
        text += f"; {result['agreement']:.3f} of the answers agree with those of the other rule"
    count = result["not_finite"]
    broken = f"\n  ({count:,} have likelihoods that are not finite, and count as wrong)"
    return text + (broken if count else "")


def _describe_distance(result: Mapping[str, Any]) -> str:
    samples, reference, network = result["samples"], result["reference"], result["network"]
    if reference["data"]:
        real = _data({**reference["data"], "examples": reference["images"]})
    else:
        images = reference["images"]
        count = f"{images:,} images" if images else "images of unknown number"
        real = (
            f"{reference['file']}: {count}, of unknown data and resize, checksum of the file "
            f"{reference['checksum']}"
        )
    text = f"of {samples['images']:,} samples against {real}"
    if samples["not_finite"]:
        text += f"\n  ({samples['not_finite']:,} samples are not finite, and compared all the same)"
    if not network["published_weights"]:
        text += (
            f"\n  (weights {network['weights_sha256'][:8]}, not the published ones: comparable "
            "only with itself)"
        )
    return text


def _data(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['name']} {facts['version']} {facts['split']}: {facts['examples']:,} images, "
        f"resize: {facts['resize']}, checksum {facts['checksum']}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
