"""inverted_residual: values and gradients against float64 in every memory mode, running statistics, deferred normalisation."""

from __future__ import annotations

import pytest
import torch
from norms import (
    branch,
    branch_norms,
    branch_tensors,
    check,
    image,
    needs_native,
    outcome,
    same,
    se_tensors,
    tensor,
)

from nvae_fast import functional as F

# batch, C, hidden, C_out, H, W, k, stride, upsample: channel tails, odd sizes, rows of 1 and 2, one image
SHAPES = [
    (2, 8, 48, 8, 8, 8, 5, 1, 1), (1, 7, 30, 33, 9, 5, 3, 1, 1), (2, 10, 30, 3, 9, 7, 5, 2, 1), (2, 16, 90, 6, 5, 6, 5, 1, 2),
    (3, 2, 7, 1, 5, 1, 5, 1, 1), (2, 30, 33, 7, 3, 2, 7, 1, 1), (96, 5, 20, 4, 1, 1, 3, 1, 1), (4, 6, 600, 5, 3, 3, 5, 1, 1),
    (48, 6, 17, 5, 1, 1, 3, 1, 2), (24, 3, 18, 4, 4, 3, 11, 2, 1),
]  # fmt: skip


def call(stride, upsample, **options):
    return lambda t, n, impl: branch(t, n, impl, stride=stride, upsample=upsample, **options)


def arguments(b, c, e, o, h, w, k, **options):
    return branch_tensors(b, c, e, o, h, w, k), branch_norms(c, e, o, **options)


# A convolution without padding and a normalisation stand behind BN0: they take its bias out again.
ZERO = ("dbias0",)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, memory, dtype):
    check(call(*shape[7:], memory=memory), *arguments(*shape[:7]), within_budget, dtype, ZERO)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_with_running_statistics(within_budget, shape, dtype):
    check(call(*shape[7:]), *arguments(*shape[:7], training=False), within_budget, dtype)


@needs_native
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_mean_of_ten_deviations(within_budget, shape):
    tensors, norms = arguments(*shape[:7])
    check(call(*shape[7:]), [tensors[0] + 8.5, *tensors[1:]], norms, within_budget, zero=ZERO)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_modes_have_the_same_bits(shape):
    args = arguments(*shape[:7])
    balanced = outcome(call(*shape[7:]), *args, "cpu")
    for memory in ("fast", "low"):
        same(balanced, outcome(call(*shape[7:], memory=memory), *args, "cpu"))


@needs_native
def test_mixed_training_and_evaluation(within_budget):
    tensors, norms = arguments(*SHAPES[0][:7])
    for frozen in range(4):
        mixed = [n._replace(training=i != frozen) for i, n in enumerate(norms)]
        check(call(1, 1), tensors, mixed, within_budget, zero=ZERO if frozen != 1 else ())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_deferred_normalisation_is_done_by_se_residual(within_budget, shape, gate, memory, dtype):
    """Values and gradients of the pair are those of the branch followed by se_residual, with budget and all."""
    tensors, norms = arguments(*shape[:7])
    b, out, upsample = shape[0], shape[3], shape[8]
    h, w = ((s * upsample - 1) // shape[7] + 1 for s in shape[4:6])
    skip, _, *rest = se_tensors(b, out, h, w)

    def pair(t, n, impl):
        options = dict(stride=shape[7], upsample=upsample, memory=memory, defer=True, return_means=memory == "low")
        y, bn, *means = branch(t[:4], n, impl, **options)
        assert (bn is None) == (impl == "reference")
        gates, means = t[5:] if gate else (None,) * 4, means[0] if means else None
        return F.se_residual(t[4], y, *gates, residual_scale=0.5, bn=bn, x_means=means, impl=impl)

    check(pair, [*tensors, skip, *(rest if gate else [])], norms, within_budget, dtype, ZERO)


@needs_native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_what_is_deferred(dtype, training):
    """Of the values as stored, without gradient: images smaller and larger than a tile of rows, several of an image."""
    for shape in (SHAPES[1], SHAPES[6], (3, 8, 24, 5, 16, 20, 3, 1, 1), (2, 4, 8, 37, 40, 31, 3, 1, 1)):
        (x, *weights), norms = arguments(*shape[:7], training=training)
        x, *weights = (t.to(dtype).requires_grad_() for t in (x, *weights))
        t, bn, means, passed = branch([x, *weights], norms, "cpu", defer=True, return_means=True, return_x=1)
        exact = t.detach().double().mean((2, 3))
        assert means.dtype == torch.float32 and not means.requires_grad and passed.shape == x.shape
        assert (means - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * t.detach().abs().max()


def test_the_reference_takes_no_means_and_nothing_else_has_any():
    tensors, norms = arguments(*SHAPES[0][:7])
    t, bn, means, passed = branch(tensors, norms, "reference", defer=True, return_means=True, return_x=1)
    assert bn is None and means is None and passed is tensors[0]
    with pytest.raises(ValueError, match="return_means without defer: expected both"):
        branch(tensors, norms, "reference", return_means=True)


@needs_native
def test_the_deferred_normalisation_may_be_done_by_either_implementation():
    tensors, norms = arguments(*SHAPES[0][:7])
    skip, _, *gate = se_tensors(2, 8, 8, 8)

    def pair(se_impl, defer=True):
        def run(t, n, impl):
            y = branch(t, n, impl, defer=defer)
            y, bn = y if defer else (y, None)
            return F.se_residual(skip, y, *gate, bn=bn, impl=se_impl)

        return outcome(run, tensors, norms, "cpu")

    apart = pair("cpu", defer=False)
    for other in (pair("cpu"), pair("reference")):
        for name, t in apart.items():
            torch.testing.assert_close(other[name], t, rtol=1e-4, atol=2e-5)


@needs_native
def test_running_statistics_move_once_however_often_backward_runs():
    tensors, norms = arguments(*SHAPES[0][:7])
    for memory in ("fast", "balanced", "low"):
        x = tensors[0].clone().requires_grad_()
        before = [n.num_batches_tracked.item() for n in norms]
        y = branch([x, *tensors[1:]], norms, "cpu", memory=memory)
        moved = [n.running_mean.clone() for n in norms]
        grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)
        assert [n.num_batches_tracked.item() for n in norms] == [b + 1 for b in before]
        assert all(torch.equal(n.running_mean, m) for n, m in zip(norms, moved, strict=True))


@needs_native
def test_low_memory_ignores_what_the_running_statistics_are_at_backward():
    """The forward's statistics are kept: evaluation in between two halves of a step changes nothing."""
    tensors, norms = arguments(*SHAPES[0][:7], training=False)
    x = tensors[0].clone().requires_grad_()
    y = branch([x, *tensors[1:]], norms, "cpu", memory="low")
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    for n in norms:
        n.running_mean.add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_the_reference_is_the_chain_of_modules():
    nn = torch.nn
    bns = [nn.BatchNorm2d(c, momentum=0.05) for c in (4, 12, 12, 5)]
    convs = [
        nn.Conv2d(4, 12, 1, bias=False),
        nn.Conv2d(12, 12, 5, 1, 2, groups=12, bias=False),
        nn.Conv2d(12, 5, 1, bias=False),
    ]
    x = image(2, 4, 6, 5)
    norms = [
        F.Norm(m.weight, m.bias, m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in bns
    ]
    chain = nn.Sequential(bns[0], convs[0], bns[1], nn.SiLU(), convs[1], bns[2], nn.SiLU(), convs[2], bns[3])
    y = F.inverted_residual(x, *(c.weight for c in convs), norms, impl="reference")
    torch.testing.assert_close(y, chain(x), rtol=1e-5, atol=1e-5)
    for n, m in zip(norms, bns, strict=True):
        torch.testing.assert_close(n.running_var, m.running_var)


@needs_native
def test_auto_takes_the_native_code_for_channels_last_images_only():
    args = arguments(*SHAPES[1][:7])
    same(outcome(branch, *args, "auto"), outcome(branch, *args, "cpu"))
    nchw = [t.contiguous() for t in args[0]], args[1]
    same(outcome(branch, *nchw, "auto"), outcome(branch, *nchw, "reference"))


@needs_native
def test_no_gradient_where_none_is_wanted():
    tensors, norms = arguments(*SHAPES[0][:7])
    project = tensors[3].requires_grad_()
    for memory in ("balanced", "low"):
        (got,) = torch.autograd.grad(branch(tensors, norms, "cpu", memory=memory).sum(dim=(2, 3)).square().sum(), project)
        assert got.isfinite().all() and got.shape == project.shape
    with torch.no_grad():
        assert not branch(tensors, norms, "cpu").requires_grad
    assert tensor(1).grad is None and norms[0].weight.grad is None
