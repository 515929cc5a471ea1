"""depthwise_conv: values, gradients, layouts and refusals, against float64 and against nn.Conv2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as tf
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.depthwise_conv import depthwise_conv

NATIVE = _impl.load_native()[0]
needs_native = pytest.mark.skipif(NATIVE is None, reason="nvae_fast was installed without its native extension")
# N, C, H, W, k, stride, dilation: channel tails, images below the kernel, odd sizes
SHAPES = [
    (2, 32, 16, 16, 5, 1, 1), (2, 30, 13, 9, 5, 1, 1), (3, 7, 6, 6, 3, 1, 1), (2, 20, 11, 11, 11, 1, 1),
    (2, 33, 12, 10, 5, 2, 1),
    (1, 16, 7, 7, 3, 2, 1), (2, 24, 9, 9, 7, 1, 1), (2, 18, 9, 14, 3, 1, 2), (2, 18, 9, 14, 5, 2, 2), (1, 5, 1, 1, 5, 1, 1),
    (1, 48, 3, 40, 9, 1, 1), (2, 16, 2, 3, 11, 2, 1), (1, 17, 5, 33, 1, 1, 1), (1, 400, 40, 40, 5, 1, 1),
]  # fmt: skip


def exact(x: Tensor, w: Tensor, stride: int, dilation: int) -> Tensor:
    return tf.conv2d(x, w, None, stride, dilation * (w.shape[-1] // 2), dilation, groups=x.shape[1])


def make(n, c, h, w, k, stride, dilation, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, c, h, w, generator=g) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (0.2 * torch.randn(c, 1, k, k, generator=g)).to(dtype)
    dy = torch.randn(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, generator=g).to(dtype)
    return x, weight, dy.contiguous(memory_format=torch.channels_last)


def run(x, w, dy, stride, dilation, impl):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = depthwise_conv(x, w, stride=stride, dilation=dilation, impl=impl)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def run_exact(x, w, dy, stride, dilation):
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    y = exact(x, w, stride, dilation)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.double())


def within_budget(got, plain, truth):
    for a, p, t in zip(got, plain, truth, strict=True):
        eps = torch.finfo(a.dtype).eps
        budget = 2 * ((p.double() - t).abs().max() + eps * t.abs().max())
        assert (a.double() - t).abs().max() <= budget


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, isa):
    before = NATIVE.instruction_set()
    if not NATIVE.use_instruction_set(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        x, w, dy = make(*shape, dtype=dtype)
        got = run(x, w, dy, *shape[5:], "cpu")
        # PyTorch's weight gradient of a dilated bfloat16 convolution may hold memory that nobody wrote
        plain = [t.float() for t in (x, w, dy)] if shape[6] > 1 else [x, w, dy]
        within_budget(got, [t.to(dtype) for t in run(*plain, *shape[5:], "reference")], run_exact(x, w, dy, *shape[5:]))
        assert got[0].is_contiguous(memory_format=torch.channels_last) and got[0].dtype == dtype
    finally:
        NATIVE.use_instruction_set(before)


def test_the_reference_is_nn_conv2d_and_twice_differentiable():
    conv = torch.nn.Conv2d(6, 6, 5, 2, 4, 2, groups=6, bias=False)
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(depthwise_conv(x, conv.weight, stride=2, dilation=2, impl="reference"), conv(x))
    x, w = torch.randn(1, 2, 4, 3, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    call = lambda x, w: depthwise_conv(x, w)  # noqa: E731  float64: the reference
    torch.autograd.gradcheck(call, (x.requires_grad_(), w.requires_grad_()))
    torch.autograd.gradgradcheck(call, (x, w))


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
def test_any_strides_of_input_weight_and_gradient(stride):
    shape = (2, 24, 10, 9, 5, stride, 1)
    x, w, dy = make(*shape)
    plain = run(x, w, dy, stride, 1, "cpu")
    wide = torch.zeros(2, 40, 12, 9).contiguous(memory_format=torch.channels_last)
    wide[:, 8:32, 1:11] = x
    layouts = {
        "nchw": x.contiguous(),
        "slice": wide[:, 8:32, 1:11],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, other in layouts.items():
        for a, b in zip(plain, run(other, w, dy, stride, 1, "cpu"), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(plain, run(x, w.flip(0).contiguous().flip(0), dy.contiguous(), stride, 1, "cpu"), strict=True):
        assert torch.equal(a, b)
    one = torch.ones(()).expand_as(dy)
    for a, b in zip(run(x, w, one, stride, 1, "cpu"), run(x, w, one.contiguous(), stride, 1, "cpu"), strict=True):
        assert torch.equal(a, b)


@needs_native
def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    x, w, dy = make(3, 40, 16, 16, 5, 1, 1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, w, dy, 1, 1, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_empty_batch_nan_and_infinity():
    w = torch.ones(4, 1, 3, 3)
    assert depthwise_conv(torch.zeros(0, 4, 5, 5), w, impl="cpu").shape == (0, 4, 5, 5)
    x = torch.zeros(1, 4, 7, 7)
    x[0, 1, 3, 3], x[0, 2, 0, 0] = float("nan"), float("inf")
    got, expected = depthwise_conv(x, w, impl="cpu"), exact(x, w, 1, 1)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


@needs_native
def test_compile_and_second_backward():
    x, w, dy = make(2, 8, 6, 5, 3, 2, 1)
    x.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(lambda x, w: depthwise_conv(x, w, stride=2), fullgraph=True, backend="aot_eager")
    y = compiled(x, w)
    for a, b in zip(torch.autograd.grad(y, (x, w), dy), run(x, w, dy, 2, 1, "cpu")[1:], strict=True):
        torch.testing.assert_close(a, b)
    (dx,) = torch.autograd.grad(depthwise_conv(x, w, impl="cpu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        dx.sum().backward()


@needs_native
def test_auto_takes_the_native_code_where_it_wins_and_follows_autocast():
    x, w, dy = make(1, 16, 8, 8, 5, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(run(x, w, dy, 1, 1, "auto"), run(x, w, dy, 1, 1, "cpu"), strict=True))
    nchw = x.contiguous()
    for a, b in zip(run(nchw, w, dy, 1, 1, "auto"), run(nchw, w, dy, 1, 1, "reference"), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(depthwise_conv(x, w), depthwise_conv(x, w, impl="reference"))
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=torch.zeros(4, 5, 5)), "x has shape (4, 5, 5): expected [N, C, H, W]"),
        (dict(weight=torch.zeros(4, 1, 4, 4)), "expected [4, 1, k, k] with k odd"),
        (dict(weight=torch.zeros(3, 1, 3, 3)), "expected [4, 1, k, k]"),
        (dict(weight=torch.zeros(4, 1, 3, 3, dtype=torch.float64)), "must be alike"),
        (dict(stride=3), "stride=3"),
        (dict(dilation=0), "dilation=0"),
        (dict(x=torch.zeros(1, 4, 5, 5, dtype=torch.int32)), "expected a floating-point tensor"),
        (dict(weight=torch.zeros(4, 1, 13, 13), impl="cpu"), "kernels up to 11"),
        (dict(impl="triton"), "triton"),
    ],
)
def test_bad_arguments_are_one_line(change, words):
    values = {"x": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(4, 1, 3, 3)} | change
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        depthwise_conv(values.pop("x"), values.pop("weight"), **values)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_a_number_reaches_as_far_as_it_is_said_to(stride):
    def nans(impl, where):
        x = torch.ones(2, 24, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
        w = torch.ones(24, 1, 5, 5, requires_grad=True)
        if where == "x":
            x.data[1, 3, 4, 4] = torch.nan
        else:
            w.data[3, 0, 0, 1] = torch.nan
        y = depthwise_conv(x, w, stride=stride, impl=impl)
        y.sum().backward()
        return [t.isnan().transpose(0, 1).flatten(1) for t in (y, x.grad, w.grad.transpose(0, 1))]  # by channel

    for where, exact in (("x", (True, True, False)), ("w", (False, False, False))):
        for got, plain, same in zip(nans("cpu", where), nans("reference", where), exact, strict=True):
            assert torch.equal(got, plain) if same else not (plain & ~got).any()
            assert not got[:3].any() and not got[4:].any() and got[3].any() == plain[3].any()
