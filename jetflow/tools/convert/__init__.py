"""Checkpoints of the published implementations: read without their libraries, and written back."""

from jetflow.tools.convert.models import jet, tarflow, to_tarflow
from jetflow.tools.convert.runs import jet_run, tarflow_run

__all__ = ["jet", "jet_run", "tarflow", "tarflow_run", "to_tarflow"]
