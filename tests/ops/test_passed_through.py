"""x handed on by the op that reads it first: the gradient that comes back is added in the last pass of that op's backward."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from norms import (
    JOINS,
    bn_act,
    branch,
    branch_norms,
    branch_tensors,
    check,
    dense,
    image,
    leaf,
    needs_native,
    norm,
    outcome,
    same,
    skipping,
    tensor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.kernels import _norm

BRANCH = branch_tensors(2, 18, 20, 18, 6, 5), branch_norms(18, 20, 18)
WIDE = image(3, 90, 19, 13)  # blocks of four vectors and single ones on any CPU, several tasks, the last one short
CALLS = {
    "bn_act": (bn_act, {}, [image(2, 18, 6, 5)], [norm(18)]),
    "bn_act, wide": (bn_act, {}, [WIDE], [norm(90)]),
    "branch, wide": (branch, {}, [WIDE, *branch_tensors(1, 90, 8, 90, 1, 1)[1:]], branch_norms(90, 8, 90)),
    "dense": (dense, dict(padding=1), [image(2, 18, 6, 5), tensor(18, 18, 3, 3, scale=0.1), tensor(18)], [norm(18)]),
    "branch": (branch, {}, *BRANCH),
    "branch low": (branch, dict(memory="low"), *BRANCH),
}
every = pytest.mark.parametrize("name", CALLS)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("join", ["added", "beside", "twice", "beside twice"])
@every
def test_values_and_gradients(within_budget, name, join, dtype):
    op, options, tensors, norms = CALLS[name]
    check(skipping(op, join, **options), tensors, norms, within_budget, dtype, ("dbias0",))


@needs_native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("join", JOINS)
@every
def test_as_where_autograd_adds_the_gradients(name, join, training):
    op, options, tensors, norms = CALLS[name]
    norms = [n._replace(training=training) for n in norms]
    found = []
    for passed in (True, False):
        call = skipping(op, join, passed, **options)
        if join in ("x alone", "both alone"):  # whose gradients are no more than that of x
            x = leaf(tensors[0])
            y = call([x, *tensors[1:]], norms, "cpu")
            found.append({"y0": y.detach(), "d0": torch.autograd.grad(y, x, tensor(*y.shape, seed=5))[0]})
        else:
            found.append(outcome(call, tensors, norms, "cpu"))
    ours, autograds = ({key: t for key, t in f.items() if key != "d0" or join == "y alone"} for f in found)
    same(ours, autograds)
    torch.testing.assert_close(found[0]["d0"], found[1]["d0"], rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.parametrize(("join", "additions"), {"added": 1, "twice": 2}.items())
@every
def test_nothing_is_added_apart_nor_kept(name, join, additions):
    op, options, tensors, norms = CALLS[name]
    seen, kept = [], []
    for passed in (True, False):
        leaves, held = [leaf(t) for t in tensors], set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, h=held: h.add(t.data_ptr()) or t, lambda t: t):
            y = skipping(op, join, passed, **options)(leaves, norms, "cpu")
        with Operations() as operations:
            torch.autograd.grad(y, leaves, tensor(*y.shape, seed=5))
        seen.append(operations.names)
        kept.append(len(held))
    assert seen[1] - seen[0] == Counter(add=additions) and not seen[0] - seen[1]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_native), "reference"])
@every
def test_x_stays_what_it_was(name, impl):
    """It has its own type under autocast, and no gradient where it had none."""
    op, options, (x, *others), norms = CALLS[name]
    call = lambda x: op([x, *(leaf(t) for t in others)], norms, impl, return_x=1, **options)  # noqa: E731
    y, passed = call(x)
    assert y.requires_grad == bool(others) and passed is x
    with torch.no_grad():
        y, passed = call(leaf(x))
    assert not y.requires_grad and torch.equal(passed, x)
    x = leaf(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, passed = call(x)
    assert torch.equal(passed, x) and passed.dtype == torch.float32
    assert op is bn_act or (y.dtype == torch.bfloat16 and passed is x)


@needs_native
def test_a_deferred_normalisation_comes_before_x():
    tensors, norms = BRANCH
    x = leaf(tensors[0])
    t, bn, passed = branch([x, *tensors[1:]], norms, "cpu", defer=True, return_x=1)
    assert t.shape == x.shape and bn.shape == (5, 18) and torch.equal(passed, x) and passed is not x
    reference = branch([x, *tensors[1:]], norms, "reference", defer=True, return_x=1)
    assert reference[1] is None and reference[2] is x


@needs_native
@pytest.mark.parametrize("join", ["added", "twice"])
@pytest.mark.parametrize("fault", ["dropped", "doubled"])
@every
def test_a_fault_would_be_seen(monkeypatch, name, fault, join):
    """Where the gradient of the skip connection, or the last of two, is lost or counted twice, the comparison above fails."""
    change = {"dropped": lambda also: None, "doubled": lambda also: 2 * also}[fault]
    seen = []

    def faulty(plain, *args):
        *others, last = args
        if last is None or last.dim() != 4:  # no gradient to add
            return plain(*args)
        seen.append(last)
        return plain(*others, change(last))

    for op in ("bn_act_bwd", "bn_act_affine_"):
        monkeypatch.setattr(torch.ops.nvae_fast, op, partial(faulty, getattr(torch.ops.nvae_fast, op)))
    with pytest.raises(AssertionError):
        test_as_where_autograd_adds_the_gradients(name, join, True)
    assert len(seen) == 1


def test_what_a_cast_read_is_not_handed_on():
    x = leaf(torch.ones(1, 2, 3, 4))
    passed = x.view_as(x)
    assert _norm.shared(x, x, [passed])[0] is passed and _norm.shared(x, x.bfloat16(), [passed])[0] is x
    assert _norm.shared(x.detach(), x.detach(), [passed])[0] is not passed


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_native), "reference"])
@every
def test_it_is_handed_to_two_readers_at_most(name, impl):
    op, options, tensors, norms = CALLS[name]
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"return_x {wrong}: expected how many others read x, 2 at most"):
            op(tensors, norms, impl, return_x=wrong, **options)


@needs_native
def test_the_only_other_gradient_comes_first():
    x, bn, c = image(2, 6, 5, 4), tensor(5, 6), tensor(3, 6)
    for call in (torch.ops.nvae_fast.bn_act_bwd, torch.ops.nvae_fast.bn_act_affine_):
        with pytest.raises(RuntimeError, match="also2 without also; pass the only gradient there is as also"):
            call(*((x, x, bn, 1, c) if call is torch.ops.nvae_fast.bn_act_bwd else (x.clone(), x, c)), None, x)
