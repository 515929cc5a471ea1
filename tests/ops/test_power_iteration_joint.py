"""The spectral gradient joined to the other gradients of many weights: as autograd would have added it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast import functional as F
from nvae_fast.kernels import _impl, use_impl
from nvae_fast.kernels.power_iteration.joint import Joint
from nvae_fast.layers import WeightNormConv2d, shared_effective_weights
from nvae_fast.regularization import SpectralState

native = pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SHAPES = [(6, 5, 3, 3), (17, 8, 1, 1), (1, 3, 2, 2), (4, 7), (5, 1, 5, 5)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


def drawn(dtype, of_weights, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = [LAYOUTS[of_weights](torch.randn(s, generator=g).to(dtype)).requires_grad_() for s in SHAPES]
    vectors = [
        (torch.randn(s[0], generator=g), torch.randn(w.numel() // s[0], generator=g))
        for s, w in zip(SHAPES, weights, strict=True)
    ]
    return weights, vectors, [torch.randn(s, generator=g) for s in SHAPES]


def gradients(dtype, of_weights, of_grads, join):
    """Of a loss that uses all weights but the first, and 0.3 times all sigma but the last."""
    weights, vectors, upstream = drawn(dtype, of_weights)
    if join:
        joint = Joint()
        used = joint.attach(weights)
        assert [w.stride() for w in used] == [w.stride() for w in weights]
        joint.vectors.update(enumerate(vectors[:-1]))
        penalty = joint.token
    else:
        used = weights
        penalty = sum((w.flatten(1) * torch.outer(u, v)).sum() for w, (u, v) in zip(weights[:-1], vectors[:-1], strict=True))
    pairs = [(w, LAYOUTS[of_grads](g.to(dtype))) for w, g in zip(used[1:], upstream[1:], strict=True)]
    loss = sum((Passing.apply(w, g)) for w, g in pairs) + 0.3 * penalty
    return torch.autograd.grad(loss, weights)


class Passing(torch.autograd.Function):
    """A number whose gradient is g, with the strides of g."""

    @staticmethod
    def forward(ctx, w, g):
        ctx.g = g
        return (w * g).sum()

    @staticmethod
    def backward(ctx, d):
        return ctx.g if d == 1 else d * ctx.g, None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("of_grads", LAYOUTS)
@pytest.mark.parametrize("of_weights", LAYOUTS)
def test_within_budget(within_budget, impl, of_weights, of_grads):
    exact = gradients(torch.float64, of_weights, of_grads, join=False)
    plain = gradients(torch.float32, of_weights, of_grads, join=False)
    with use_impl(impl):
        for a, b, c in zip(gradients(torch.float32, of_weights, of_grads, join=True), plain, exact, strict=True):
            within_budget(a, b, c)


def test_half_precision_weights():
    plain, got = (gradients(torch.bfloat16, "channels_last", "contiguous", join=join) for join in (False, True))
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


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
    assert count.found.count("add") + count.found.count("add_") <= 1  # the plain convolution


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
            if type(f).__name__ == "_JoinBackward":
                kept.append(weakref.ref(f.vectors[0][0]))
            node += [g for g, _ in f.next_functions]
        del f, node, seen
        assert kept and kept[0]() is not None
        del loss
        assert kept[0]() is None
    finally:
        gc.enable()


def test_reference_is_differentiable_twice():
    weights, vectors, _ = drawn(torch.float64, "contiguous")
    vectors = [(u.double(), v.double()) for u, v in vectors[1:3]]

    def joined(*weights):
        joint = Joint()
        used = joint.attach(weights)
        joint.vectors.update(enumerate(vectors))
        return sum((w**3).sum() for w in used) + 0.3 * joint.token

    assert torch.autograd.gradgradcheck(joined, weights[1:3])


def test_no_graph_no_joint():
    convs = convolutions()
    with torch.no_grad(), shared_effective_weights(convs):
        assert all(getattr(c, "joint", None) is None for c in convs)
    weights = [w.detach() for w in drawn(torch.float32, "contiguous")[0][:2]]
    sigma, *_ = F.power_iteration(weights, [torch.ones(6), torch.ones(17)], [torch.ones(45), torch.ones(8)], iterations=1)
    assert sigma.shape == (2,)
