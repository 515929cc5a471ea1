"""depthwise_conv's Triton kernels: values and gradients against float64, strides, dilations, up-sampling, the C++ op."""

from __future__ import annotations

import pytest
import torch
from norms import CL, check_stats, copied, depthwise, image, needs_native, norm, outcome, same, tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF = torch.float32, torch.float16
# N, C, H, W, k, stride, dilation, upsample: tiles hold 2048 values, of 64 channels at most
SHAPES = [(1, 33, 7, 5, 5, 1, 1, 1), (2, 7, 5, 6, 3, 2, 1, 1), (1, 9, 4, 3, 3, 1, 1, 2), (3, 1, 1, 1, 3, 1, 1, 1)]
DILATED = [(1, 17, 9, 7, 3, 1, 2, 1), (1, 5, 9, 8, 5, 2, 3, 1), (1, 4, 3, 5, 3, 1, 2, 2), (1, 70, 3, 2, 1, 1, 9, 1)]
CASES = [(shape, "swish", dtype) for shape in SHAPES for dtype in (FLOAT, HALF)]
CASES += [(shape, "swish", FLOAT) for shape in DILATED]  # PyTorch's own gradient in 16 bits may hold memory that nobody wrote
CASES += [(shape, act, FLOAT) for shape in SHAPES[1:3] for act in (None, "identity", "elu")]


def tensors(n, c, h, w, k):
    return [image(n, c, h, w), tensor(c, 1, k, k, scale=1 / k)]


def call(stride, dilation, upsample, act="swish"):
    return lambda t, n, i: depthwise(t, n, i, act, stride=stride, dilation=dilation, upsample=upsample)


@pytest.mark.parametrize(("shape", "act", "dtype"), CASES, ids=str)
def test_values_and_gradients(check, shape, act, dtype):
    check(call(*shape[5:], act), tensors(*shape[:5]), [norm(shape[1])] if act else [], dtype, 2)


def test_with_running_statistics(check):
    check(call(1, 1, 1), tensors(1, 33, 7, 5, 3), [norm(33, training=False)], FLOAT, 2)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 9, 8, 1, 1, 1, 1)], ids=str)
def test_statistics_of_the_output(shape, dtype):
    x, w = tensors(*shape[:5])
    sizes = dict(zip(("stride", "dilation", "upsample"), shape[5:], strict=True))
    args, n = ((x + 8.5).to(dtype), w.to(dtype)), norm(shape[1])
    y, stats = F.depthwise_conv(*args, **sizes, norm=copied(n), act="swish", return_stats=True, impl="triton")
    assert torch.equal(y, F.depthwise_conv(*args, **sizes, norm=copied(n), act="swish", impl="triton"))
    check_stats(stats, y)


def arguments(shape):
    """Of the raw backward, with a normalisation on either side."""
    x, w = tensors(*shape[:5])
    out = [(n * shape[7] - 1) // shape[5] + 1 for n in shape[2:4]]
    y, dy = (tensor(shape[0], shape[1], *out, seed=s) for s in (1, 2))
    return dy, y, tensor(3, shape[1], seed=3), x, tensor(5, shape[1], seed=4), 1, w, *shape[5:]


@needs_native
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("shape", [(1, 33, 7, 5, 3, 1, 1, 1), *SHAPES[1:]], ids=str)
def test_every_schema_as_in_the_native_code(monkeypatch, shape, before, behind):
    dy, y, c, x, bn, act, w, *sizes = arguments(shape)
    y, c, bn, act = *((y, c) if behind else (None, None)), *((bn, act) if before else (None, 0))
    found = []
    for _ in range(2):
        raw = torch.ops.nvae_fast
        found.append([*raw.depthwise_conv_fwd(x, bn, act, w, *sizes, behind)])
        found[-1] += raw.depthwise_conv_bwd(dy, y, c, x, bn, act, w, *sizes)
        for arranged in (dy.clone(), dy.clone(memory_format=torch.contiguous_format)) if sizes == [1, 1, 1] else ():
            found[-1] += [arranged, *raw.depthwise_conv_bwd_(arranged, y, c, x, bn, act, w, 1)]
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5)


def test_any_strides_64_bit_offsets_and_reruns_give_the_same_bits(monkeypatch):
    args, n = tensors(1, 33, 5, 7, 3), [norm(33)]
    dense = outcome(depthwise, args, n, "triton")
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if t.shape[1] > 1 else t.mT.contiguous().mT  # noqa: E731
    same(dense, outcome(depthwise, args, n, "triton", sliced, torch.Tensor.contiguous))
    ready = lambda t: t if t.shape[1] > 1 else t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)  # noqa: E731
    same(dense, outcome(depthwise, args, n, "triton", ready))  # filters as a folded model keeps them
    same(dense, outcome(depthwise, args, n, "triton"))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    same(dense, outcome(depthwise, args, n, "triton"))
    assert dense["y0"].is_contiguous(memory_format=CL)


def test_nan_stays_where_the_taps_reach():
    x, w = tensors(2, 9, 6, 5, 3)
    x[1, 4, 2, 1] = torch.nan
    y = F.depthwise_conv(x, w, impl="triton")
    assert y.isnan().sum() == 9 and y[1, 4, 1:4, :3].isnan().all()
    y = F.depthwise_conv(x, w, norm=norm(9), act="swish", impl="triton")
    assert y.isnan().sum() == 60 and y[:, 4].isnan().all()


@pytest.mark.parametrize("shape", [(0, 9, 4, 3), (2, 0, 4, 3), (2, 9, 0, 3)], ids=str)
def test_nothing_to_convolve_gives_zeros(shape):
    x, w = torch.ones(shape, requires_grad=True), torch.ones(shape[1], 1, 3, 3, requires_grad=True)
    y, stats = F.depthwise_conv(x, w, return_stats=True, impl="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and w.grad.shape == w.shape and not stats.any() and not w.grad.any()


def test_arguments_that_do_not_fit_are_refused():
    dy, y, c, x, bn, act, w, *sizes = arguments((2, 9, 4, 3, 3, 1, 1, 1))
    raw = torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="expected both y and c"):
        raw.depthwise_conv_bwd(dy, y, None, x, bn, act, w, *sizes)
    with pytest.raises(RuntimeError, match="dy has shape"):
        raw.depthwise_conv_bwd(dy[:1], y, c, x, bn, act, w, *sizes)
    with pytest.raises(RuntimeError, match=r"weight has shape .* expected \[9, 1, k, k\] with k odd"):
        raw.depthwise_conv_fwd(x, bn, act, w[:8], *sizes, False)
