"""weight_norm against the fixtures and a plain formula, gradients also at norm 0, precisions, bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels.flow_cell import autoregressive_mask
from nvae_fast.kernels.weight_norm import weight_norm

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"
SHAPES = [(4, 3, 3, 3), (5, 2), (6, 1, 5, 5), (3, 4, 1)]


def make(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]
    norms = [torch.randn((s[0],) + (1,) * (len(s) - 1), generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]
    masks = [None, (torch.rand(SHAPES[1], generator=g) < 0.7).float(), (torch.rand(SHAPES[2], generator=g) < 0.5), None]
    return weights, norms, masks


def plain(w, norm, mask, eps=1e-5):
    w = w if mask is None else w * mask
    length = torch.linalg.vector_norm(w, dim=list(range(1, w.dim())), keepdim=True)
    return norm.exp() * w / (length + eps)


@pytest.fixture(scope="module")
def blocks():
    return load_file(FIXTURES / "blocks.safetensors")


@pytest.mark.parametrize("name", ["conv2d", "arconv"])
def test_fixture_of_fresh_convolutions(blocks, name):
    weight, norm, used = (blocks[f"fresh_init/{name}/{k}"] for k in ("weight", "log_weight_norm", "weight_used"))
    mask = autoregressive_mask(24, 4, 3, strict=True, mirror=False) if name == "arconv" else None
    (effective,) = weight_norm([weight], [norm], [mask])
    torch.testing.assert_close(effective, used, rtol=1e-6, atol=1e-7)


def test_fixture_of_a_convolution_with_gradients(blocks):
    prefix = "conv2d_wn_bias"
    names = ("weight", "log_weight_norm", "bias")
    weight, norm, bias = (blocks[f"{prefix}/state/{n}"].requires_grad_() for n in names)
    (effective,) = weight_norm([weight], [norm])
    y = torch.nn.functional.conv2d(blocks[f"{prefix}/in0"], effective, bias, padding=1)
    torch.testing.assert_close(y, blocks[f"{prefix}/out_train"], rtol=1e-5, atol=1e-5)
    (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
    for name, parameter in zip(names, (weight, norm, bias), strict=True):
        torch.testing.assert_close(parameter.grad, blocks[f"{prefix}/grad/{name}"], rtol=1e-4, atol=1e-5)


def test_plain_formula():
    weights, norms, masks = make(torch.float64)
    expected = [plain(*item) for item in zip(weights, norms, masks, strict=True)]
    torch.testing.assert_close(weight_norm(weights, norms, masks), expected, rtol=1e-12, atol=1e-12)
    unmasked = [plain(w, n, None, eps=0.1) for w, n in zip(weights, norms, strict=True)]
    torch.testing.assert_close(weight_norm(weights, norms, eps=0.1), unmasked, rtol=1e-12, atol=1e-12)
    assert weight_norm([], []) == []


def test_gradients_of_first_and_second_order():
    weights, norms, masks = make(torch.float64)
    leaves = tuple(t.requires_grad_() for t in (*weights[1:3], *norms[1:3]))

    def f(w0, w1, n0, n1):
        return tuple(weight_norm([w0, w1], [n0, n1], masks[1:3]))

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


def test_zero_norm():
    weight = torch.randn(3, 2, 3, 3)
    weight[2] = 0
    mask = torch.ones_like(weight)
    mask[1] = 0
    weight.requires_grad_()
    norm = torch.zeros(3, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([weight], [norm], [mask])
    assert (effective[1:] == 0).all()
    dw, dl = torch.autograd.grad((effective * torch.randn_like(weight)).sum(), (weight, norm), create_graph=True)
    assert dw.isfinite().all() and (dw[1] == 0).all() and (dl[1:] == 0).all()
    second = torch.autograd.grad(dw.sum() + dl.sum(), (weight, norm))
    assert all(t.isfinite().all() for t in second)


def test_strided_weights_and_gradients():
    weights, norms, masks = make()
    w, norm = weights[0], norms[0]
    strided = torch.stack([w, w], dim=-1)[..., 0].requires_grad_()
    dense = w.clone().requires_grad_()
    (expected,), (out,) = weight_norm([dense], [norm]), weight_norm([strided], [norm])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    for dy in (torch.ones(1).expand(w.shape), torch.randn(3, 3, 3, 4).permute(3, 0, 1, 2)):
        grads = [torch.autograd.grad(y, t, dy, retain_graph=True)[0] for y, t in ((out, strided), (expected, dense))]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    weights, norms, masks = make(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = weight_norm(weights, norms, masks)
    for y, w, norm, mask in zip(results, weights, norms, masks, strict=True):
        assert y.dtype == torch.bfloat16
        exact = plain(w.double(), norm.double(), mask)
        error = (plain(w, norm, None if mask is None else mask.bfloat16()).double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (error + torch.finfo(y.dtype).eps * exact.abs().max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2, 3)], []), "1 weights, 0 log_norms, no masks"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], []), "1 weights, 1 log_norms, 0 masks"),
        (([torch.zeros(3)], [torch.zeros(3)]), r"weights\[0\] of shape \(3,\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2)]), r"log_norms\[0\] of shape \(2,\): expected \(2, 1\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.zeros(3)]), r"masks\[0\] of shape \(3,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        weight_norm(*arguments)
    assert "\n" not in str(caught.value)
