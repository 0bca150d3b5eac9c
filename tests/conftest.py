"""Shapes are checked: beartype and jaxtyping check every annotation of jetflow in every test."""

import pytest
from jaxtyping import install_import_hook

# Before the first import of jetflow, so that every module of it is instrumented.
install_import_hook("jetflow", "beartype.beartype")

import jax  # noqa: E402


@pytest.fixture
def float64():
    """Double precision inside the test: production runs in single, laws are tested in double."""
    with jax.enable_x64(True):
        yield
