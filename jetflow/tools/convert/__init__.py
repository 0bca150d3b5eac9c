"""Checkpoints of the published implementations: read without their libraries, and written back."""

from jetflow.tools.convert.models import itarflow, jet, tarflow, to_tarflow
from jetflow.tools.convert.runs import itarflow_run, jet_run, tarflow_run

__all__ = ["itarflow", "itarflow_run", "jet", "jet_run", "tarflow", "tarflow_run", "to_tarflow"]
