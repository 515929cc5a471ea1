"""depthwise_conv with impl="cuda", its source executed in the emulator: values and all gradients against float64."""

from __future__ import annotations

import pytest
import torch
from norms import depthwise, image, norm, same, tensor

from nvae_fast import functional as F

# N, C, H, W, k, stride, dilation, upsample -> the kernels that run, forward and backward, in float32 and in 16 bits
DENSE = {
    (2, 64, 16, 16, 5, 1, 1, 1): ("core", "tensor"),
    (1, 40, 9, 17, 5, 1, 1, 1): ("core", "tensor"),  # tails of channels, rows and columns
    (2, 72, 3, 20, 5, 1, 1, 1): ("core", "tensor"),
    (3, 72, 8, 8, 5, 1, 1, 1): ("core", "core"),
    (2, 24, 7, 6, 3, 1, 1, 1): ("core", "core"),
    (1, 16, 20, 9, 3, 1, 1, 1): ("core", "core"),
    (5, 8, 1, 1, 5, 1, 1, 1): ("core", "core"),
}
ANY = ("any", "any")
OTHERS = {
    (2, 30, 5, 6, 5, 1, 1, 1): ANY, (2, 7, 6, 5, 3, 1, 1, 1): ANY,  # channels that 16 bytes do not divide
    (2, 33, 7, 6, 5, 2, 1, 1): ANY, (1, 66, 5, 4, 3, 2, 1, 1): ANY, (2, 20, 3, 2, 11, 2, 1, 1): ANY,
    (2, 18, 9, 7, 3, 1, 2, 1): ANY, (1, 18, 9, 5, 5, 2, 2, 1): ANY, (1, 8, 4, 4, 3, 1, 9, 1): ANY,
    (2, 40, 3, 4, 5, 1, 1, 2): ANY, (1, 9, 5, 3, 7, 1, 2, 2): ANY, (4, 1, 1, 1, 9, 1, 1, 2): ANY,
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(n, c, h, w, k):
    return [image(n, c, h, w), tensor(c, 1, k, k, scale=1 / k)]


def call(stride, dilation, upsample, act="swish", **options):
    return lambda t, n, i: depthwise(t, n, i, act, stride=stride, dilation=dilation, upsample=upsample, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*DENSE, *OTHERS], ids=str)
def test_values_and_gradients(check, cuda_on_cpu, shape, dtype):
    check(call(*shape[5:]), tensors(*shape[:5]), [norm(shape[1])], dtype, torch.float32 if shape[6] > 1 else dtype)
    single, half = (DENSE | OTHERS)[shape]
    assert set(cuda_on_cpu.ran) == {single if dtype == torch.float32 else half}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("act", ["identity", "elu"])
@pytest.mark.parametrize("shape", [(1, 40, 9, 17, 5, 1, 1, 1), (2, 24, 7, 6, 3, 1, 1, 1), (1, 18, 4, 4, 5, 2, 1, 1)], ids=str)
def test_activations(check, shape, act, dtype):
    check(call(*shape[5:], act), tensors(*shape[:5]), [norm(shape[1], training=False)], dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 9, 17, 5, 1, 1, 1), (2, 24, 7, 6, 3, 1, 1, 1), (1, 18, 4, 4, 5, 1, 1, 2)], ids=str)
def test_without_a_norm(check, shape, dtype):
    check(call(*shape[5:]), tensors(*shape[:5]), [], dtype)


@pytest.mark.parametrize("shape", [(2, 24, 10, 9, 5, 1, 1, 1), (2, 18, 6, 5, 3, 2, 1, 1)], ids=str)
def test_any_strides_of_input_weight_and_gradient(cuda_on_cpu, shape):
    from norms import outcome

    x, w = tensors(*shape[:5])
    one = lambda *t, **arrange: outcome(call(*shape[5:]), t, [norm(shape[1])], "cuda", **arrange)  # noqa: E731
    plain = one(x, w)
    wide = torch.zeros(shape[0], shape[1] + 16, shape[2] + 2, shape[3]).contiguous(memory_format=torch.channels_last)
    wide[:, 8:-8, 1:-1] = x
    same(plain, one(wide[:, 8:-8, 1:-1], w))
    same(plain, one(x, w, arrange=torch.Tensor.contiguous))
    same(plain, one(x, w, arrange=lambda t: t.mT.contiguous().mT))
    same(plain, one(x, w.flip(0).contiguous().flip(0), arrange_dy=lambda t: t.mT.contiguous().mT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_around_the_image_are_not_normalised(cuda_on_cpu, dtype):
    """Padding is 0 behind the normalisation: where every pixel equals the mean and the bias is 0, y is 0 up to the rim."""
    for shape in ((1, 8, 9, 10, 5, 1, 1, 1), (1, 8, 4, 4, 5, 1, 1, 1), (1, 3, 4, 4, 5, 1, 1, 1)):
        x = torch.full(shape[:4], 5.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
        n = F.Norm(running_mean=torch.full((shape[1],), 5.0), running_var=torch.ones(shape[1]), training=False)
        y = F.depthwise_conv(x, tensor(shape[1], 1, 5, 5).to(dtype), norm=n, act="swish", impl="cuda")
        assert y.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 10, 12), (1, 16, 6, 5), (1, 6, 5, 6)], ids=str)
def test_nan_and_infinity_stay_where_pytorch_has_them(cuda_on_cpu, shape, dtype):
    """Also in the tensor-core kernel, whose multiplications with zeros would spread them over eight channels."""
    x, w = torch.zeros(shape, dtype=dtype), torch.ones(shape[1], 1, 5, 5, dtype=dtype)
    x[0, 1, 3, 3], x[0, 2, 0, 0] = float("nan"), float("inf")
    got, expected = (F.depthwise_conv(x, w, impl=impl) for impl in ("cuda", "reference"))
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert torch.equal(got.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))
    w[4, 0, 2, 2] = float("nan")  # the middle tap never lies outside
    assert torch.equal(F.depthwise_conv(x, w, impl="cuda")[:, 4].isnan(), torch.ones(1, *shape[2:], dtype=torch.bool))
    assert torch.equal(F.depthwise_conv(x, w, impl="cuda")[:, 5:], got[:, 5:])


def test_empty_batch(cuda_on_cpu):
    x, w = torch.zeros(0, 8, 5, 5, requires_grad=True), torch.ones(8, 1, 3, 3, requires_grad=True)
    y, stats = F.depthwise_conv(x, w, impl="cuda", return_stats=True)
    y.sum().backward()
    assert y.shape == x.shape and not stats.any() and not w.grad.any() and x.grad.shape == x.shape
