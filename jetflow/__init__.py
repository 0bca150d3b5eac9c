"""jetflow: transformer normalizing flows in JAX. Train, sample and evaluate Jet and TarFlow."""

from jetflow import convert
from jetflow.evals.bpd import bits_per_dim
from jetflow.flows.build import build
from jetflow.sampling.ancestral import sample
from jetflow.types import Batch, Flow, Guidance, UsageError

__all__ = [
    "Batch",
    "Flow",
    "Guidance",
    "UsageError",
    "bits_per_dim",
    "build",
    "convert",
    "sample",
]
