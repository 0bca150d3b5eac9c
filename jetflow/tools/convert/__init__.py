"""Checkpoints of the published implementations: read without their libraries, and written back."""

from jetflow.tools.convert.models import jet, tarflow, to_tarflow

__all__ = ["jet", "tarflow", "to_tarflow"]
