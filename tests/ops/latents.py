"""What the tests of the latent distribution's kernels share."""

from __future__ import annotations

import importlib

import pytest
import torch
from norms import CL

from nvae_fast.kernels import _triton

# Tails of pixels and channels, several steps, one pixel, more channels than a program takes.
SHAPES = {torch.contiguous_format: [(1, 2, 5, 7), (1, 1, 33, 17)], CL: [(2, 3, 5, 7), (1, 5, 1, 1), (1, 70, 3, 5)]}


def same(found, others):
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(found, others, strict=True))


@pytest.fixture
def small_programs(monkeypatch):
    """So that small maps take several programs, and a program several steps."""
    tiles = importlib.import_module("nvae_fast.kernels.residual_normal._tiles")
    monkeypatch.setattr(tiles, "COLUMNS", 64)
    monkeypatch.setattr(tiles, "STEPS", 3)
    monkeypatch.setattr(_triton, "tasks", lambda rows, least, wanted: _tasks(rows, least, 3))


_tasks = _triton.tasks
