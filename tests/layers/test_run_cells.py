"""Cells in a row hand on the statistics of their outputs: the same numbers, with one pass over each output less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.cells import Cell, DecoderCombiner, EncoderCombiner, run_cells
from nvae_fast.kernels import _impl

needs_native = pytest.mark.skipif(_impl.load_native()[0] is None, reason="nvae_fast was installed without its native extension")
OPS = {"residual": ["res_bnswish", "res_bnswish"], "branch": ["mconv_e3k5g0"], "grouped": ["mconv_e2k3g4"]}


class Calls(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.found = name, []

    @property
    def count(self) -> int:
        return len(self.found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == self.name:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def tower(ops: list[str]) -> list[nn.Module]:
    """Of which the second and third cell, and the fourth behind a combiner that only looks, read what a cell wrote."""
    torch.manual_seed(0)
    modules = [Cell(8, 8, ops, stride=1, use_se=True) for _ in range(2)]
    modules += [Cell(8, 16, ops, stride=2, use_se=True), EncoderCombiner(16, 16), Cell(16, 8, ops, stride=-1, use_se=False)]
    modules += [DecoderCombiner(8, 3), Cell(8, 8, ops, stride=1, use_se=True)]
    return list(nn.ModuleList(modules).to(memory_format=torch.channels_last))


def run(modules: list[nn.Module], *, chained: bool) -> dict[str, Tensor]:
    modules = copy.deepcopy(modules)
    x, z = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    x, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, z[:, :3]))
    x.requires_grad_()

    seen: list[Tensor] = []
    if chained:
        h = run_cells(modules, x, lambda module, h, **options: module(h, z, **options), seen.append)
    else:
        h = x
        for module in modules:
            if isinstance(module, EncoderCombiner):
                seen.append(h)
            else:
                h = module(h, z) if isinstance(module, DecoderCombiner) else module(h)
    assert [t.shape for t in seen] == [(2, 16, 4, 4)]
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (h, *seen)).backward()
    found = nn.ModuleList(modules)
    grads = {name: p.grad for name, p in found.named_parameters() if p.grad is not None}
    return {"y": h.detach(), "dx": x.grad} | grads | dict(found.named_buffers())


@pytest.mark.parametrize(("memory", "training"), [("fast", True), ("balanced", True), ("low", True), ("balanced", False)])
@pytest.mark.parametrize("ops", OPS.values(), ids=list(OPS))
def test_the_numbers_are_those_of_one_cell_after_the_other(ops, memory, training):
    """The running statistics among them: they move once."""
    modules = [m.train(training) for m in tower(ops)]
    for op in (op for m in modules if isinstance(m, Cell) for op in m.ops):
        op.memory = memory
    plain, got = (run(modules, chained=chained) for chained in (False, True))
    assert plain.keys() == got.keys()
    for name, t in plain.items():  # the gradient of a bias before a normalisation is 0 but for rounding
        torch.testing.assert_close(got[name], t, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@needs_native
@pytest.mark.parametrize("ops", ["residual", "branch"])
def test_a_cell_behind_a_cell_takes_no_statistics_of_what_it_reads(ops):
    """Nor anything else of its first normalisation, unless that reads every pixel more than once."""
    counts = []
    for chained in (False, True):
        with Calls("bn_act_stats") as stats, Calls("bn_act_coefficients") as coefficients:
            run([m.train() for m in tower(OPS[ops])], chained=chained)
        counts.append(stats.count)
        assert coefficients.count == (chained and ops == "branch")
    assert counts[0] - counts[1] == 3


@needs_native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ops", OPS)
def test_a_branch_hands_the_means_of_its_output_to_squeeze_excitation(ops, training):
    """Where there is one; and they are those of what it reads."""
    with Calls("se_residual_fwd") as calls:
        run([m.train(training) for m in tower(OPS[ops])], chained=True)
    cells = [m for m in tower(OPS[ops]) if isinstance(m, Cell)]
    assert [args[7] is not None for args in calls.found] == [ops == "branch" and m.se is not None for m in cells]
    for _, x, *_, means in (args[:8] for args in calls.found if args[7] is not None):
        torch.testing.assert_close(means, x.mean((2, 3)), rtol=1e-5, atol=1e-6)


def adding_apart(op: nn.Module) -> None:
    """From now on the op hands on the x that it was given, so that autograd adds what comes back."""
    name = "branch" if hasattr(op, "branch") else "forward"
    original = getattr(op, name)

    def changed(x: Tensor, stats: Tensor | None = None, *, return_x: int = 0, **options: bool) -> tuple[Tensor, ...]:
        found = original(x, stats, **options)
        return (*(found if isinstance(found, tuple) else (found,)), *[x] * return_x)

    setattr(op, name, changed)


@needs_native
@pytest.mark.parametrize("memory", ["fast", "balanced", "low"])
@pytest.mark.parametrize("which", [0, 2, 4], ids=["same size", "half", "double"])
@pytest.mark.parametrize("ops", ["residual", "branch"])
def test_the_gradients_of_what_a_cell_reads_are_added_by_no_pass_of_their_own(ops, which, memory):
    cell = tower(OPS[ops])[which].train()
    for op in cell.ops:
        op.memory = memory
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16 if which == 4 else 8, 8, 8, generator=g).contiguous(memory_format=torch.channels_last)
    for another in (False, True):
        found, counts = [], []
        for change in (lambda op: None, adding_apart):
            module, leaf = copy.deepcopy(cell), x.clone(memory_format=torch.preserve_format).requires_grad_()
            change(module.ops[0])
            y, *handed = module(leaf, return_x=True) if another else (module(leaf),)
            dy, *others = (torch.randn(t.shape, generator=torch.Generator().manual_seed(2)) for t in (y, *handed))
            with Calls("add") as calls:
                grads = torch.autograd.grad([y, *handed], [leaf, *module.parameters()], [dy, *others])
            found.append([y, *handed, *grads])
            counts.append(calls.count)
        assert counts[1] - counts[0] == 1 + another
        for ours, autograds in zip(*found, strict=True):
            torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-5)
