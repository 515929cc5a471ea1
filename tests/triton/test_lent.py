"""The first pass of se_residual's backward joined with the last pass of the op that reads its output: the same numbers, to the
bit; and every way on which the gradient that comes back is another, where se_residual takes its own pass."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from norms import bn_act, copied, leaf, norm, preact, preact_weights, se_tensors, tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae_fast import functional as F
from nvae_fast.cells import Cell, EncoderCombiner, run_cells
from nvae_fast.kernels import _lent

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
OWN, JOINED = "se_residual_dgate_kernel", "se_residual_dy_kernel"


def tower(op):
    """Of three cells, two read what a cell wrote, one of them behind a combiner that only looks."""
    torch.manual_seed(0)
    ops = {"residual": ["res_bnswish", "res_bnswish"], "branch": ["mconv_e2k3g0"]}[op]
    first, *others = (Cell(4, 4, ops, stride=stride, use_se=True) for stride in (2, 1, -1))
    return nn.ModuleList([first, EncoderCombiner(4, 4), *others]).to(memory_format=torch.channels_last).train()


def step(modules, x):
    seen = []
    x, modules = leaf(x), copy.deepcopy(modules)
    y = run_cells(list(modules), x, look=seen.append)
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (y, *seen)).backward()
    return {"x": x.grad} | {name: p.grad for name, p in modules.named_parameters()}


@pytest.mark.parametrize("op", ["residual", "branch"])
def test_cells_in_a_row(launches, monkeypatch, op):
    """The last one's output is read by no normalisation. It costs a launch less each, and no number is another."""
    modules, x = tower(op), tensor(1, 4, 4, 4)
    with launches() as names:
        found = step(modules, x)
    monkeypatch.setattr(_lent, "_lent_by", lambda ctx: None)
    with launches() as separate:
        expected = step(modules, x)
    for name, t in expected.items():
        assert (t is None) == (found[name] is None) and (t is None or torch.equal(t, found[name])), name
    names, separate = (Counter(n for n in launched if not n.startswith("torch.")) for launched in (names, separate))
    assert names[JOINED] == 2 and names[OWN] == 1 and separate[OWN] == 3
    assert separate.total() - names.total() == 2


def test_a_chain_of_3x3s(launches, monkeypatch):
    tensors, weights, norms = se_tensors(1, 5, 8, 8), preact_weights(5, 4, 5), [norm(5), norm(4)]
    found, names = [], []
    for _ in range(2):
        leaves = list(map(leaf, (*tensors, *weights)))
        y = F.se_residual(*leaves[:6], impl="triton")
        z, y = preact([y, *leaves[6:]], list(map(copied, norms)), "triton", return_x=1)
        with launches() as launched:
            found.append(torch.autograd.grad(z + y, leaves, tensor(1, 5, 8, 8)))
        names.append(Counter(n for n in launched if n.startswith(("bn_act", "se_residual"))))
        monkeypatch.setattr(_lent, "_lent_by", lambda ctx: None)
    assert all(map(torch.equal, *found))
    assert names[1] - names[0] == {OWN: 1, "bn_act_affine_kernel": 1} and names[0] - names[1] == {JOINED: 1}


# ---- whose gradient it is


class Chain:
    """y = se(skip, x), then z = act(norm(y)) + y by an op that hands y on."""

    def __init__(self):
        self.skip, self.x, *self.gate = map(leaf, se_tensors(2, 5, 4, 3, 2))
        self.leaves = [self.skip, self.x, *self.gate]
        self.norm, self.dz = norm(5), tensor(2, 5, 4, 3, seed=9)

    def se(self):
        return F.se_residual(self.skip, self.x, *self.gate, impl="triton")

    def read(self, y):
        z, y = bn_act([y], [copied(self.norm)], "triton", return_x=1)
        return z + y


def plainly(chain):
    return torch.autograd.grad(chain.read(chain.se()), chain.leaves, chain.dz)


def hooked(chain, hook):
    y = chain.se()
    y.register_hook(hook)
    return torch.autograd.grad(chain.read(y), chain.leaves, chain.dz)


def scaled(chain):
    return hooked(chain, lambda g: 2 * g)


def scaled_in_place(chain):
    def hook(g):
        g *= 2

    return hooked(chain, hook)


def looked_at(chain):
    return hooked(chain, lambda g: None)


def with_another_reader(chain):
    y = chain.se()
    return torch.autograd.grad(chain.read(y) + 3 * y, chain.leaves, chain.dz)


def with_another_of_its_kind(chain):
    y = chain.se()
    return torch.autograd.grad(chain.read(y) + 2 * chain.read(y), chain.leaves, chain.dz)


def twice(chain):
    z = chain.read(chain.se())
    first = torch.autograd.grad(z, chain.leaves, chain.dz, retain_graph=True)
    return [*first, *torch.autograd.grad(z, chain.leaves, 2 * chain.dz)]


def by_parts(chain):
    """What the first part has left is not what the second one brings."""
    y = chain.se()
    (dy,) = torch.autograd.grad(chain.read(y), [y], chain.dz)
    return torch.autograd.grad(y, chain.leaves, 2 * dy)


def behind_a_view(chain):
    y = chain.se()
    return torch.autograd.grad(chain.read(y.view_as(y)), chain.leaves, chain.dz)


class Stranger(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.lent = "something else"
        return 2 * y

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def behind_a_stranger(chain):
    return torch.autograd.grad(chain.read(Stranger.apply(chain.se())), chain.leaves, chain.dz)


def with_second_derivatives(chain):
    return torch.autograd.grad(chain.read(chain.se()), chain.leaves, chain.dz, create_graph=True)


def in_inference_mode(chain):
    """Whose tensors do not say whether they were written to."""
    z = chain.read(chain.se())
    with torch.inference_mode():
        return torch.autograd.grad(z, chain.leaves, chain.dz)


def below_a_checkpoint(chain):
    return torch.autograd.grad(chain.read(checkpoint(chain.se, use_reentrant=False)), chain.leaves, chain.dz)


def inside_a_checkpoint(chain):
    z = checkpoint(lambda: chain.read(chain.se()), use_reentrant=False)
    return torch.autograd.grad(z, chain.leaves, chain.dz)


def with_saved_tensors_elsewhere(chain):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        z = chain.read(chain.se())
    return torch.autograd.grad(z, chain.leaves, chain.dz)


# joined passes, se_residual's own
USES = dict.fromkeys((plainly, looked_at), (1, 0)) | {twice: (2, 0), with_another_of_its_kind: (2, 1)}
USES |= dict.fromkeys(
    (scaled, scaled_in_place, with_another_reader, by_parts, with_second_derivatives, in_inference_mode), (1, 1)
)
USES |= dict.fromkeys(
    (behind_a_view, behind_a_stranger, below_a_checkpoint, inside_a_checkpoint, with_saved_tensors_elsewhere), (0, 1)
)


@pytest.mark.parametrize("way", USES, ids=lambda way: way.__name__)
def test_shares_are_those_of_the_gradient_that_arrives(launches, monkeypatch, way):
    chain = Chain()
    with launches() as names:
        found = way(chain)
    monkeypatch.setattr(_lent, "_lent_by", lambda ctx: None)
    for a, b in zip(found, way(chain), strict=True):
        assert torch.equal(a, b)
    assert (names.count(JOINED), names.count(OWN)) == USES[way]


def test_nothing_is_kept_longer_for_it(monkeypatch):
    """Neither dy nor what is lent, nor the shares: without a collection of cycles, while the graph is still there."""
    kept, give_back = [], _lent.Lent.give_back

    def noted(lent, dy, shares):
        kept[:] = map(weakref.ref, (dy, lent.tensors()[0], shares))
        give_back(lent, dy, shares)

    monkeypatch.setattr(_lent.Lent, "give_back", noted)
    chain = Chain()
    chain.x = 2 * chain.x
    gc.disable()
    try:
        y = chain.se()
        z = chain.read(y)
        torch.autograd.grad(z, [y], chain.dz, retain_graph=True)
        assert kept[0]() is None and kept[1]() is chain.x
        torch.autograd.grad(z, [chain.skip], chain.dz)
        del chain.x
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
