"""se_residual against composed torch ops and the fixture, gradients, layouts, precisions, bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels.se_residual import se_residual

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"


def make(batch=2, channels=6, hidden=4, size=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, channels, size, size)] * 2 + [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def composed(skip, x, w1, b1, w2, b2, scale=0.1):
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
    hidden = torch.nn.functional.relu(torch.nn.functional.linear(pooled, w1, b1))
    gate = torch.sigmoid(torch.nn.functional.linear(hidden, w2, b2))
    return skip + scale * x * gate[:, :, None, None]


def test_fixture():
    data = load_file(FIXTURES / "blocks.safetensors")
    names = ("se.0.weight", "se.0.bias", "se.2.weight", "se.2.bias")
    x = data["se_40/in0"].requires_grad_()
    gate = [data[f"se_40/state/{name}"].requires_grad_() for name in names]
    y = se_residual(torch.zeros_like(x), x, *gate, residual_scale=1.0)
    torch.testing.assert_close(y, data["se_40/out_train"], rtol=1e-5, atol=1e-6)
    (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
    torch.testing.assert_close(x.grad, data["se_40/grad_in0"], rtol=1e-5, atol=1e-6)
    for name, parameter in zip(names, gate, strict=True):
        torch.testing.assert_close(parameter.grad, data[f"se_40/grad/{name}"], rtol=1e-4, atol=1e-5)


def test_composed_ops():
    args = make(dtype=torch.float64)
    torch.testing.assert_close(se_residual(*args, residual_scale=0.3), composed(*args, scale=0.3), rtol=1e-12, atol=1e-12)


def test_without_gate():
    skip, x, *_ = make()
    assert torch.equal(se_residual(skip, x, None, None, None, None, residual_scale=0.5), skip + 0.5 * x)


def test_gradients_of_first_and_second_order():
    args = tuple(t.requires_grad_() for t in make(channels=3, hidden=2, size=2, dtype=torch.float64))
    assert gradcheck(se_residual, args)
    assert gradgradcheck(se_residual, args)


@pytest.mark.parametrize("gate", [True, False])
def test_a_bias_of_x(gate):
    skip, x, *gates = make(channels=3, hidden=2, size=2, dtype=torch.float64)
    gates, bias = gates if gate else [None] * 4, torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    args = [t if t is None else t.requires_grad_() for t in (skip, x, *gates, bias)]
    given = lambda *t: se_residual(*t[:6], bias=t[6])  # noqa: E731
    assert torch.equal(given(*args), se_residual(skip, x + bias[:, None, None], *gates))
    assert gradcheck(given, args) and gradgradcheck(given, args)


def test_the_reference_takes_its_own_means():
    args = make(dtype=torch.float64)
    assert torch.equal(se_residual(*args, x_means=torch.zeros(2, 6)), se_residual(*args))


def test_strided_inputs_and_gradients():
    skip, x, *gate = make()
    dense = [skip.requires_grad_(), x.requires_grad_()]
    y = se_residual(*dense, *gate)
    buffer = torch.zeros(2, 8, 3, 4)
    buffer[:, 2:, :, :3] = x.detach()
    strided = [
        skip.detach().to(memory_format=torch.channels_last).requires_grad_(),
        buffer[:, 2:, :, :3].requires_grad_(),
    ]
    out = se_residual(*strided, *gate)
    torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)
    for dy in (torch.ones(1).expand(y.shape), torch.randn(2, 3, 3, 6).permute(0, 3, 1, 2)):
        expected = torch.autograd.grad(y, dense, dy, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(out, strided, dy, retain_graph=True), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    args = make(channels=16, size=8, dtype=torch.bfloat16)
    y = se_residual(*args)
    assert y.dtype == torch.bfloat16
    exact = se_residual(*(t.double() for t in args))
    plain_error = (composed(*args).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * (plain_error + torch.finfo(y.dtype).eps * exact.abs().max())


def test_mixed_dtypes_and_autocast():
    skip, x, *gate = make()
    expected = se_residual(skip, x.bfloat16().float(), *gate)
    assert torch.equal(se_residual(skip, x.bfloat16(), *gate), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(se_residual(skip, x.bfloat16(), *gate), expected)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(2, 6), r"x of shape \(2, 6\)"),
        (0, torch.zeros(2, 6, 3, 1), r"skip of shape \(2, 6, 3, 1\): expected the shape of x"),
        (3, None, "b1 is None: expected all of w1, b1, w2, b2, or none"),
        (4, torch.zeros(4, 6), r"w2 of shape \(4, 6\): expected \(6, 4\)"),
    ],
)
def test_bad_arguments(position, value, message):
    args = make()
    args[position] = value
    with pytest.raises(ValueError, match=message) as caught:
        se_residual(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(5)}, r"bias of shape \(5,\): expected \(6,\)"),
        ({"bias": torch.zeros(6), "bn": torch.zeros(5, 6)}, "bias beside bn: expected one of them"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta: expected cpu"),
        ({"x_means": torch.zeros(6)}, r"x_means of shape \(6,\) and torch.float32: expected float32 \(2, 6\)"),
        ({"x_means": torch.zeros(2, 6).double()}, r"x_means of shape \(2, 6\) and torch.float64: expected float32 \(2, 6\)"),
        ({"x_means": torch.zeros(2, 6, device="meta")}, "x_means is on meta: expected cpu"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        se_residual(*make(), **options)
    assert "\n" not in str(caught.value)
