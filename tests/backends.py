"""The backends of message passing, as parameters of tests, each left out where it cannot run."""

from __future__ import annotations

import importlib.util
import os

import pytest

from simworld.kernels.graph_block import BACKENDS

SCATTER = pytest.param(
    "scatter",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("torch_scatter") is None, reason="torch_scatter is not installed"
    ),
)
# Triton decides as it is imported whether its kernels are interpreted, so test_triton runs these in another process.
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton starts the interpreter"),
)
EVERY = [{"scatter": SCATTER, "triton": TRITON}.get(name, name) for name in BACKENDS]
COMPILED = [each for each in EVERY if each is not TRITON]  # for what would take the interpreter minutes
