"""What a decoder cell keeps for backward, in units of one [B, C, H, W] float32 tensor, and that its memory modes agree."""

from __future__ import annotations

import copy

import pytest
import torch
from norms import CL, needs_native, tensor

from nvae_fast.cells import Cell
from nvae_fast.kernels import use_impl
from nvae_fast.layers import InvertedResidual

CHANNELS, SIZE, BATCH = 32, 16, 4
UNIT = BATCH * CHANNELS * SIZE * SIZE * 4  # bytes
SMALL = 0.2  # tables of O(C) values


def make() -> Cell:
    torch.manual_seed(0)
    return Cell(CHANNELS, CHANNELS, ["mconv_e6k5g0"], stride=1, use_se=True).to(memory_format=CL)


def step(cell: Cell, memory: str = "balanced") -> tuple[float, list[torch.Tensor]]:
    """(units kept for backward without the parameters, [output, gradients, buffers])"""
    for m in cell.modules():
        if isinstance(m, InvertedResidual):
            m.memory = memory
    x = tensor(BATCH, CHANNELS, SIZE, SIZE).requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in cell.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors too, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), t.detach()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = cell(x)
    units = sum(size for size, _ in kept.values()) / UNIT
    dy = tensor(*y.shape, seed=1)
    return units, [y.detach(), *torch.autograd.grad(y, [x, *cell.parameters()], dy), *cell.buffers()]


@needs_native
@pytest.mark.parametrize(("memory", "units"), [("fast", 20), ("balanced", 14), ("low", 2)])
def test_units_kept_for_backward(memory, units):
    assert step(make(), memory)[0] <= units + SMALL


def test_the_plain_composition_keeps_about_forty():
    with use_impl("reference"):
        units, _ = step(make())
    assert 30 < units < 50


@needs_native
def test_memory_modes_agree_and_follow_the_plain_composition():
    cell = make()
    found = {memory: step(copy.deepcopy(cell), memory)[1] for memory in ("fast", "balanced", "low")}
    for memory in ("fast", "low"):
        assert all(torch.equal(a, b) for a, b in zip(found[memory], found["balanced"], strict=True))
    with use_impl("reference"):
        plain = step(copy.deepcopy(cell))[1]
    for a, b in zip(found["balanced"], plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))


@needs_native
@pytest.mark.parametrize("memory", ["fast", "balanced", "low"])
@pytest.mark.parametrize("stride", [1, 2, -1])
def test_cells_of_every_stride_follow_the_plain_composition(memory, stride):
    torch.manual_seed(1)
    cell = Cell(8, 8, ["mconv_e3k5g0", "mconv_e3k5g0"], stride=stride, use_se=True).to(memory_format=CL)
    found = []
    for impl in ("auto", "reference"):
        twin, x = copy.deepcopy(cell), tensor(2, 8, 8, 6).requires_grad_()
        for m in twin.modules():
            if isinstance(m, InvertedResidual):
                m.memory = memory
        with use_impl(impl):
            y = twin(x)
        found.append([y, *torch.autograd.grad(y, [x, *twin.parameters()], tensor(*y.shape, seed=1)), *twin.buffers()])
    largest = max(t.abs().max().item() for t in found[1][1:] if t.is_floating_point())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)
