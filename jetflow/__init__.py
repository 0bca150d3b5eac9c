"""jetflow: transformer normalizing flows in JAX. Train, sample and evaluate Jet and TarFlow."""

import pkgutil
from typing import Any

# The public names, each imported when it is first used: so `import jetflow` takes no time.
_PUBLIC = {
    "Batch": "jetflow.types:Batch",
    "Decoding": "jetflow.types:Decoding",
    "Flow": "jetflow.types:Flow",
    "Guidance": "jetflow.types:Guidance",
    "Model": "jetflow.model:Model",
    "UsageError": "jetflow.types:UsageError",
    "bits_per_dim": "jetflow.evals.likelihoods:bits_per_dim",
    "bench": "jetflow.tools.throughput",
    "build": "jetflow.flows.build:build",
    "convert": "jetflow.tools.convert",
    "load_model": "jetflow.model:load_model",
    "plan": "jetflow.tools.plan.roofline:plan",
    "prepare": "jetflow.data.dataset:prepare",
    "report": "jetflow.tools.report.document:report",
    "sample": "jetflow.sampling.ancestral:sample",
    "sweep": "jetflow.tools.sweep.runner:sweep",
    "train": "jetflow.training.loop:train",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jetflow' has no attribute {name!r}")
    return pkgutil.resolve_name(_PUBLIC[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
