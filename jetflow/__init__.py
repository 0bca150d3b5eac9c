"""jetflow: transformer normalizing flows in JAX. Train, sample and evaluate Jet and TarFlow."""

from jetflow.evals.likelihoods import bits_per_dim
from jetflow.flows.build import build
from jetflow.sampling.ancestral import sample
from jetflow.tools import convert
from jetflow.types import Batch, Decoding, Flow, Guidance, UsageError
from jetflow.workdir import load_model

__all__ = [
    "Batch",
    "Decoding",
    "Flow",
    "Guidance",
    "UsageError",
    "bits_per_dim",
    "build",
    "convert",
    "load_model",
    "sample",
]
