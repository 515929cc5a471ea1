"""Parameters of a pass shared by one autograd node: values and gradients are those of autograd's own operations."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from sharings import LAYOUTS, SHAPES, TERMS, compare, drawn, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.kernels import _impl, use_impl
from nvae_fast.kernels.shared_weights import SharedWeights
from nvae_fast.layers import (
    BatchNormAct2d,
    InvertedResidual,
    MaskedConv2d,
    WeightNormConv2d,
    effective,
    shared_effective_weights,
)
from nvae_fast.layers.norm import bn_regularizer
from nvae_fast.regularization import SpectralState

native = pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]


@native
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_grads", LAYOUTS)
@pytest.mark.parametrize("of_weights", LAYOUTS)
def test_within_budget(within_budget, low, of_weights, of_grads):
    compare(within_budget, "cpu", low, of_weights, of_grads)


@native
def test_reruns_give_the_same_bits():
    once, again = (run("cpu", torch.bfloat16) for _ in range(2))
    assert all(map(torch.equal, once[0], again[0]))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))


@native
def test_the_reference_joins_nothing_and_values_keep_their_strides():
    weights, norms, masks, _ = drawn(layout="channels_last")
    for impl, joins in (("reference", False), ("cpu", True)):
        shared = SharedWeights(weights, norms, masks, [torch.float32] * len(SHAPES), impl=impl)
        assert [v.stride() for v in shared.values] == [w.stride() for w in weights]
        assert all((shared.claim(name) is not None) == joins for name in set(TERMS.values()))
        assert all(shared.claim(name) is None for name in set(TERMS.values()))  # each is given away once
        for i, w in enumerate(weights):
            assert torch.equal(shared.matrix(i), shared.values[i]) and shared.matrix(i).dtype == w.dtype


@native
def test_what_needs_no_gradient_has_none():
    weights, norms, masks, _ = drawn()
    for t in (*weights[2:], *norms):
        if t is not None and t is not norms[6]:
            t.requires_grad_(False)
    shared = SharedWeights(weights, norms, masks, [torch.bfloat16] * len(SHAPES), impl="cpu")
    assert [v.requires_grad for v in shared.values] == [i < 2 or i == 6 for i in range(len(SHAPES))]
    shared.terms.update({i: ("spectral", torch.ones(SHAPES[i][0]), torch.ones(weights[i][0].numel())) for i in (0, 2)})
    (shared.claim("spectral") + sum(v.float().sum() for v in shared.values)).backward()
    assert weights[0].grad is not None and weights[1].grad is not None and norms[0].grad is None
    assert norms[6].grad is not None and weights[6].grad is None
    with torch.no_grad():
        shared = SharedWeights(weights, norms, masks, [torch.bfloat16] * len(SHAPES), impl="cpu")
    assert shared.claim("spectral") is None and not any(v.requires_grad for v in shared.values)


def test_wrong_arguments():
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="1 weights, 2 log_norms, 1 masks, 1 dtypes: expected one of each") as caught:
        SharedWeights([one], [None, None], [None], [torch.float32])
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: it takes float32"):
        SharedWeights([one.double()], [None], [None], [torch.float64], impl="cpu")
    with pytest.raises(RuntimeError, match="impl='reference'"):
        w = torch.ones(2, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(SharedWeights([w], [None], [None], [torch.float32]).values[0].square().sum(), w,
                                       create_graph=True)  # fmt: skip
        slope.sum().backward()


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def convolutions():
    torch.manual_seed(0)
    kinds = [WeightNormConv2d] * 4 + [nn.Conv2d]
    return [kind(6, 6, 3, padding=1).to(memory_format=torch.channels_last) for kind in kinds]


def loss_of(convs, *states, shared=True, coefficients=(0.5, 0.25)):
    x = torch.ones(2, 6, 8, 8)
    if not shared:
        for conv in convs:
            x = conv(x)
        return x.square().mean() + sum(c * s(convs) for c, s in zip(coefficients, states, strict=False))
    with shared_effective_weights(convs):
        for conv in convs:
            x = conv(x)
        return x.square().mean() + sum(c * s(convs) for c, s in zip(coefficients, states, strict=False))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_regulariser_as_without_sharing(impl, count):
    """Two regularisers in one pass: the second one goes its own way."""
    results = []
    for shared in (True, False):
        convs, states = convolutions(), [SpectralState(seed) for seed in range(count)]
        with use_impl(impl):
            for _ in range(2):
                loss = loss_of(convs, *states, shared=shared)
            loss.backward()
        results.append([loss.detach(), *(p.grad for c in convs for p in c.parameters()), *states[0].state_dict().values()])
        assert all(getattr(c, "joint", None) is None for c in convs)
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


@native
def test_one_call_for_all_shared_weights():
    convs, state = convolutions(), SpectralState()
    loss_of(convs, state).backward()
    for c in convs:
        c.zero_grad()
    loss = loss_of(convs, state)
    with Counting() as count:
        loss.backward()
    assert count.found.count("power_iteration_add") == 1
    assert count.found.count("add") + count.found.count("add_") <= 1  # torch's own convolution takes its parameter itself


@native
def test_nothing_is_left_behind():
    """No cycle keeps the graph of a step: its memory is free when the loss is."""
    convs, state = convolutions(), SpectralState()
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(convs, state)
        kept = []
        node, seen = [loss.grad_fn], set()
        while node:
            f = node.pop()
            if f is None or f in seen:
                continue
            seen.add(f)
            if type(f).__name__ == "SharedBackward":
                kept.append(weakref.ref(f.terms[0][1]))
            node += [g for g, _ in f.next_functions]
        del f, node, seen
        assert kept and kept[0]() is not None
        del loss
        assert kept[0]() is None
    finally:
        gc.enable()


class Small(nn.Module):
    """Every kind of module that shares its parameters, on images of 6 channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = WeightNormConv2d(6, 6, 3, padding=1)
        self.bn = BatchNormAct2d(6)
        self.cell = InvertedResidual(6, 6, expansion=2, kernel_size=3)
        self.grouped = InvertedResidual(6, 6, expansion=2, kernel_size=3, groups=2)
        self.pending = WeightNormConv2d(6, 6, 1, data_init=True)
        self.masked = MaskedConv2d(6, 6, 3, bias=True)
        with torch.no_grad():
            for bn in self.kind(BatchNormAct2d):
                bn.weight += 0.1 * torch.randn_like(bn.weight)
        self.to(memory_format=torch.channels_last)

    def kind(self, kind):
        return [m for m in self.modules() if isinstance(m, kind)]

    def forward(self, x):
        for part in (self.first, self.bn, self.cell, self.grouped, self.pending, self.masked):
            x = part(x)
        return x


def trained(low, sharing, joint, steps=2, frozen=()):
    """The gradients of every parameter after some passes, and what each pass gave."""
    model, spectral, found = Small(), SpectralState(), []
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
    for _ in range(steps):
        convs, norms = model.kind(nn.Conv2d), model.kind(BatchNormAct2d)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if sharing:
                with shared_effective_weights([*convs, *(norms if joint else ())]):
                    y, extra = model(x).float(), spectral(convs) + 2 * bn_regularizer(norms)
            else:
                y, extra = model(x).float(), spectral(convs) + 2 * bn_regularizer(norms)
        (y.square().mean() + 0.3 * extra).backward()  # gradients accumulate
        found += [y.detach(), extra.detach()]
    assert all(getattr(m, n, None) is None for m in model.modules() for n in ("effective", "effective_bias", "joint"))
    return found, {n: p.grad for n, p in model.named_parameters()}, spectral.state_dict()


def test_the_largest_gamma_of_norms_in_a_pass_has_the_slope_that_autograd_gives():
    """Shared evenly where several are as large, of either sign; none where all are 0."""
    norms = [BatchNormAct2d(c) for c in (3, 5, 2)]
    with torch.no_grad():
        norms[0].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norms[1].weight.copy_(torch.tensor([3.0, 1.0, -3.0, 3.0, 0.0]))
        norms[2].weight.zero_()
    with shared_effective_weights(norms):
        total = bn_regularizer(norms)
    total.backward()
    third = torch.tensor(1 / 3)
    for norm, slope in zip(norms, ([0, -1, 0], [third, 0, -third, third, 0], [0, 0]), strict=True):
        assert torch.equal(norm.weight.grad, torch.tensor(slope, dtype=torch.float32))
    assert total == 5


def test_a_norm_that_is_listed_twice_counts_twice():
    norms = [BatchNormAct2d(c) for c in (3, 5)]
    with shared_effective_weights(norms):
        total = bn_regularizer([*norms, norms[0]])
    total.backward()
    assert total == 3 and torch.equal(norms[0].weight.grad, torch.full((3,), 2 / 3))


@pytest.mark.parametrize("joint", [False, True], ids=["convolutions", "with norms"])
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_pass_as_module_by_module(impl, low, joint):
    with use_impl(impl):
        alone, shared = (trained(low, sharing, joint) for sharing in (False, True))
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=2e-6)


@native
def test_frozen_parameters():
    frozen = "first.log_weight_norm", "bn.weight", "cell.expand.weight", "masked.weight", "masked.log_weight_norm"
    alone, shared = (trained(True, sharing, True, frozen=frozen) for sharing in (False, True))
    assert all((shared[1][name] is None) == (name in frozen) for name in shared[1])
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=2e-6)


def test_types_inside_a_pass():
    """Autocast's where it would cast; a flow's filters as they are; all of it gone afterwards."""
    model = Small()
    with torch.autocast("cpu", torch.bfloat16), shared_effective_weights(model.kind(nn.Conv2d)):
        plain, masked = model.cell.expand, model.masked
        for conv, dtype in ((plain, torch.bfloat16), (model.first, torch.bfloat16), (masked, torch.float32)):
            assert effective(conv).dtype == dtype and (conv.bias is None or effective(conv, "bias").dtype == dtype)
        assert effective(model.pending) is model.pending.weight
        inner = effective(plain)
        with shared_effective_weights(model.kind(nn.Conv2d)):
            assert effective(plain) is inner
        assert effective(plain) is inner
    assert effective(plain) is plain.weight and effective(model.first, "bias") is model.first.bias


@native
def test_autocast_casts_no_parameter_of_its_own():
    model, x = Small(), torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    model(x)  # initialised from data
    sizes = {p.numel() for c in model.kind(nn.Conv2d) for p in (c.weight, c.bias) if p is not None}

    class Casts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "_to_copy" and args[0].numel() in sizes:
                self.found.append(args[0].shape)
            return func(*args, **kwargs or {})

    with torch.autocast("cpu", torch.bfloat16), shared_effective_weights(model.kind(nn.Conv2d)), Casts() as casts:
        for part in (model.first, model.cell, model.grouped, model.pending):
            x = part(x)
    assert not casts.found


def test_no_graph_no_joint():
    convs = convolutions()
    with torch.no_grad(), shared_effective_weights(convs):
        assert all(getattr(c, "joint", None) is None for c in convs)
