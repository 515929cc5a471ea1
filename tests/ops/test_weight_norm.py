"""weight_norm: the fixtures, a plain formula, norm 0, bad arguments, in every implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck
from weight_norms import IMPLS, make, plain, run

from nvae_fast.kernels.flow_cell import autoregressive_mask
from nvae_fast.kernels.weight_norm import weight_norm

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"


@pytest.fixture(scope="module")
def blocks():
    return load_file(FIXTURES / "blocks.safetensors")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["conv2d", "arconv"])
def test_fixture_of_fresh_convolutions(blocks, name, impl):
    weight, norm, used = (blocks[f"fresh_init/{name}/{k}"] for k in ("weight", "log_weight_norm", "weight_used"))
    mask = autoregressive_mask(24, 4, 3, strict=True, mirror=False) if name == "arconv" else None
    (effective,) = weight_norm([weight], [norm], [mask], impl=impl)
    torch.testing.assert_close(effective, used, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_fixture_of_a_convolution_with_gradients(blocks, impl):
    prefix = "conv2d_wn_bias"
    names = ("weight", "log_weight_norm", "bias")
    weight, norm, bias = (blocks[f"{prefix}/state/{n}"].clone().requires_grad_() for n in names)
    (effective,) = weight_norm([weight], [norm], impl=impl)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_norm(impl):
    weight = torch.randn(3, 2, 3, 3)
    weight[2] = 0
    mask = torch.ones_like(weight)
    mask[1] = 0
    weight.requires_grad_()
    norm = torch.zeros(3, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([weight], [norm], [mask], impl=impl)
    assert (effective[1:] == 0).all()
    dy = torch.randn_like(weight)
    dw, dl = torch.autograd.grad(effective, (weight, norm), dy, create_graph=True)
    assert dw.isfinite().all() and (dw[1] == 0).all() and (dl[1:] == 0).all()
    torch.testing.assert_close(dw[2], dy[2] / 1e-5)
    if impl == "reference":
        second = torch.autograd.grad(dw.sum() + dl.sum(), (weight, norm))
        assert all(t.isfinite().all() for t in second)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_weights_log_norms_and_gradients(impl):
    row, log_norm = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([row.expand(4, 3, 2, 2)], [log_norm.expand(4, 1, 1, 1)], impl=impl)
    (expected,) = [plain(row.expand(4, 3, 2, 2), log_norm, None)]
    torch.testing.assert_close(effective, expected, rtol=1e-6, atol=1e-6)
    dy = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1).expand(4, 3, 2, 2)
    found, wanted = (torch.autograd.grad(y, (row, log_norm), dy) for y in (effective, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_a_graph_break(impl):
    masks = make()[2]

    def f(weights, norms):
        out = weight_norm(weights, norms, masks, impl=impl)
        return sum((y * (i + y)).sum() for i, y in enumerate(out[:3]))

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        weights, norms, _ = make()
        leaves = [t.requires_grad_() for t in (*weights, *norms)]
        found.append(torch.autograd.grad(g(weights, norms), leaves, materialize_grads=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_weights(impl):
    shapes = [(0, 3, 3, 3), (2, 0), (3, 2)]
    weights, norms, _ = make(shapes=shapes)
    found = run(weights, norms, None, impl)
    assert [t.shape for t in found] == [t.shape for t in (*weights, *weights, *norms)]
    assert all(t.isfinite().all() for t in found) and (found[-2] == 0).all()
    assert weight_norm([], [], impl=impl) == []


def test_bfloat16():
    weights, norms, masks = make(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = weight_norm(weights, norms, masks)
    for y, w, norm, mask in zip(results, weights, norms, masks, strict=True):
        assert y.dtype == torch.bfloat16
        exact = plain(w.double(), norm.double(), mask)
        error = (plain(w, norm, None if mask is None else mask.bfloat16()).double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (error + torch.finfo(y.dtype).eps * exact.abs().max())


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_nan_takes_its_row(impl):
    weight = torch.ones(3, 4)
    weight[1, 2] = torch.nan
    (y,) = weight_norm([weight], [torch.zeros(3, 1)], impl=impl)
    assert y.isnan().all(dim=1).tolist() == [False, True, False] and y.isnan().sum() == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2, 3)], []), "1 weights, 0 log_norms, no masks"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], []), "1 weights, 1 log_norms, 0 masks"),
        (([torch.zeros(3)], [torch.zeros(3)]), r"weights\[0\] of shape \(3,\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2)]), r"log_norms\[0\] of shape \(2,\): expected \(2, 1\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.zeros(3)]), r"masks\[0\] of shape \(3,\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.ones(2, 3, requires_grad=True)]), r"masks\[0\] requires a grad"),
        (
            ([torch.zeros(2, 3)], [torch.zeros(2, 1, device="meta")]),
            r"log_norms\[0\] is on meta: expected cpu, where weights\[0",
        ),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.ones(2, 3, device="meta")]), r"masks\[0\] is on meta: expected cpu"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        weight_norm(*arguments)
    assert "\n" not in str(caught.value)
