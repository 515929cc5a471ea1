"""inverted_residual as a chain of Triton kernels: values and gradients in every memory mode; what a cell launches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from norms import branch, branch_norms, branch_tensors, leaf, needs_native, outcome, same, se_tensors, skipping, tensor

from nvae_fast import functional as F

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF = torch.float32, torch.float16
# batch, C, hidden, C_out, H, W, k, stride, upsample
SHAPES = [(2, 5, 18, 7, 4, 5, 3, 1, 1), (1, 4, 12, 6, 6, 5, 5, 2, 1), (2, 6, 17, 3, 3, 2, 3, 1, 2)]


def call(stride, upsample, **options):
    return lambda t, n, impl: branch(t, n, impl, stride=stride, upsample=upsample, **options)


def arguments(b, c, e, o, h, w, k, *_, **options):
    return branch_tensors(b, c, e, o, h, w, k), branch_norms(c, e, o, **options)


@pytest.mark.parametrize(("memory", "dtype"), [("balanced", FLOAT), ("low", HALF)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(check, shape, memory, dtype):
    check(call(*shape[7:], memory=memory), *arguments(*shape), dtype, 4)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_with_running_statistics(check, shape):
    check(call(*shape[7:]), *arguments(*shape, training=False), FLOAT, 4)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_memory_modes_have_the_same_bits(shape):
    args = arguments(*shape)
    balanced = outcome(call(*shape[7:]), *args, "triton")
    for memory in ("fast", "low"):
        same(balanced, outcome(call(*shape[7:], memory=memory), *args, "triton"))


@pytest.mark.parametrize(("gate", "memory"), [(True, "low"), (False, "balanced")])
def test_the_deferred_normalisation_is_done_by_se_residual(check, gate, memory):
    tensors, norms = arguments(*SHAPES[0])
    skip, _, *rest = se_tensors(2, 7, 4, 5)

    def pair(t, n, impl):
        y, bn, means = branch(t[:4], n, impl, memory=memory, defer=True, return_means=True)
        assert (bn is None) == (impl == "reference")
        gates = t[5:] if gate else (None,) * 4
        return F.se_residual(t[4], y, *gates, residual_scale=0.5, bn=bn, x_means=means, impl=impl)

    check(pair, [*tensors, skip, *(rest if gate else [])], norms, FLOAT, 5)


@pytest.mark.parametrize(
    ("join", "memory", "dtype"), [("added", "low", FLOAT), ("beside", "balanced", HALF), ("twice", "balanced", FLOAT)]
)
def test_x_passed_through(check, join, memory, dtype):
    check(skipping(branch, join, memory=memory), *arguments(2, 7, 18, 7, 4, 5, 3), dtype, 4)


def test_running_statistics_move_once_however_often_backward_runs():
    tensors, norms = arguments(*SHAPES[0])
    for memory in ("balanced", "low"):  # "fast" runs as "balanced" does
        x, before = leaf(tensors[0]), [n.num_batches_tracked.item() for n in norms]
        y = branch([x, *tensors[1:]], norms, "triton", memory=memory)
        moved = [n.running_mean.clone() for n in norms]
        assert torch.equal(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2)))
        assert [n.num_batches_tracked.item() for n in norms] == [b + 1 for b in before]
        assert all(torch.equal(n.running_mean, m) for n, m in zip(norms, moved, strict=True))


@pytest.mark.parametrize("wanted", ["t", "bn"])
def test_one_of_the_two_deferred_outputs_may_go_unused(wanted):
    """The gradient of the other is absent, which is 0."""
    tensors, norms = arguments(*SHAPES[0])
    found = []
    for other in (0.0, None):
        x = leaf(tensors[0])
        t, bn = branch([x, *tensors[1:]], norms, "triton", defer=True)
        used, unused = (t, bn) if wanted == "t" else (bn, t)
        loss = (used * tensor(*used.shape, seed=1)).sum()
        found += torch.autograd.grad(loss if other is None else loss + other * unused.sum(), x)
    assert torch.equal(*found) and found[0].any()


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_in_the_native_code(monkeypatch, shape):
    args = arguments(*shape)
    ours = outcome(call(*shape[7:]), *args, "triton")
    monkeypatch.undo()
    for name, t in outcome(call(*shape[7:]), *args, "cpu").items():
        torch.testing.assert_close(ours[name], t, rtol=1e-4, atol=2e-4)


def test_strided_images_and_gradients():
    tensors, norms = arguments(*SHAPES[0])
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if t.shape[1] > 1 else t  # noqa: E731
    same(outcome(branch, tensors, norms, "triton"), outcome(branch, tensors, norms, "triton", sliced, torch.Tensor.contiguous))


def test_an_empty_batch():
    tensors, norms = arguments(*SHAPES[0])
    x = torch.empty(0, 5, 4, 5, requires_grad=True)
    weights = [leaf(t) for t in tensors[1:]]
    branch([x, *weights], norms, "triton").sum().backward()
    assert x.grad.shape == x.shape and not any(t.grad.any() for t in weights)


# Of a cell in training: Triton's, then torch's own
FORWARD = Counter(
    bn_act_stats_kernel=1, pointwise_conv_fwd_kernel=2, bn_act_fwd_kernel=1,
    depthwise_conv_fwd_kernel=1, se_residual_fwd_kernel=1,
)  # fmt: skip
BACKWARD = Counter(
    pointwise_conv_bwd_kernel=2, depthwise_conv_g_kernel=1, depthwise_conv_bwd_kernel=1,
    bn_act_affine_kernel=1, se_residual_dgate_kernel=1, se_residual_bwd_kernel=1,
)  # fmt: skip
AGAIN = Counter(pointwise_conv_fwd_kernel=1, bn_act_fwd_kernel=1, depthwise_conv_fwd_kernel=1)


@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_launches_of_a_cell(launches, memory):
    """Branch, squeeze-and-excitation and residual sum: 6 forward, 7 backward ("low": 3 more) instead of 29 and 36."""
    tensors, norms = arguments(2, 4, 12, 4, 4, 4, 3)
    norms = [n._replace(weight=leaf(n.weight), bias=leaf(n.bias)) for n in norms]
    leaves = [leaf(t) for t in (*tensors, *se_tensors(2, 4, 4, 4)[2:])]
    with launches() as forward:
        t, bn, means, skip = branch(leaves[:4], norms, "triton", memory=memory, defer=True, return_means=True, return_x=1)
        y = F.se_residual(skip, t, *leaves[4:], bn=bn, x_means=means, impl="triton")
    dy, wanted = tensor(*y.shape, seed=5), [*leaves, *(p for n in norms for p in n[:2])]
    with launches() as backward:
        torch.autograd.grad(y, wanted, dy)
    assert Counter(forward) == FORWARD and FORWARD.total() == 6
    assert Counter(backward) == BACKWARD + (AGAIN if memory == "low" else Counter()) and BACKWARD.total() == 7
