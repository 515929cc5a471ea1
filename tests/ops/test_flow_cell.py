"""flow_cell and its masks against the fixtures, the triangular Jacobian, gradients, precisions, bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels.flow_cell import autoregressive_mask, flow_cell, flow_cells
from nvae_fast.kernels.weight_norm import weight_norm

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"
LAYERS = ("conv.convz.0", "conv.convz.2", "mu.conv_0")


@pytest.fixture(scope="module")
def blocks():
    return load_file(FIXTURES / "blocks.safetensors")


def masks(channels, hidden, mirror):
    return [
        autoregressive_mask(hidden, channels, 3, strict=True, mirror=mirror),
        autoregressive_mask(hidden, hidden, 5, groups=hidden, strict=False, mirror=mirror),
        autoregressive_mask(channels, hidden, 1, strict=False, mirror=mirror),
    ]


def make(channels=2, batch=2, size=4, mirror=False, dtype=torch.float32):
    """z and masked weights, no normalisation."""
    g = torch.Generator().manual_seed(3)
    hidden = 6 * channels
    weights = [(torch.randn(m.shape, generator=g) * 0.5 * m).to(dtype) for m in masks(channels, hidden, mirror)]
    z = torch.randn(batch, channels, size, size, generator=g).to(dtype)
    return [z, *weights, torch.randn(channels, generator=g).to(dtype)]


def composed(z, w_in, w_dw, w_out, bias):
    h = F.elu(F.conv2d(z, w_in, padding=1))
    h = F.elu(F.elu(F.conv2d(h, w_dw, padding=2, groups=h.shape[1])))
    return z - F.conv2d(h, w_out, bias)


@pytest.mark.parametrize("mirror", [False, True])
def test_fixture_of_masks(blocks, mirror):
    names = ("in3x3", "dw5x5", "out1x1")
    ours = dict(zip(names, masks(4, 24, mirror), strict=True))
    ours["same3x3"] = autoregressive_mask(4, 4, 3, strict=True, mirror=mirror)
    for name, mask in ours.items():
        assert torch.equal(mask, blocks[f"ar_mask/{name}_mirror{int(mirror)}"]), name


def test_mask_of_fewer_outputs_than_inputs_when_strict():
    centre = autoregressive_mask(2, 6, 1, strict=True, mirror=False)[:, :, 0, 0]
    assert centre.tolist() == [[0] * 6, [1] * 3 + [0] * 3]
    assert autoregressive_mask(3, 3, 3, groups=3, strict=True, mirror=False)[:, 0, 1, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("arguments", [(4, 3, 3), (4, 4, 2), (4, 4, 3, 2)])
def test_bad_masks(arguments):
    with pytest.raises(ValueError, match="expected") as caught:
        autoregressive_mask(*arguments, strict=True, mirror=False)
    assert "\n" not in str(caught.value)


def parameters(blocks, prefix):
    weights = [blocks[f"{prefix}.{layer}.weight"].clone().requires_grad_() for layer in LAYERS]
    norms = [blocks[f"{prefix}.{layer}.log_weight_norm"].clone().requires_grad_() for layer in LAYERS]
    return weights, norms, blocks[f"{prefix}.mu.conv_0.bias"].clone().requires_grad_()


@pytest.mark.parametrize("case", ["ar_cell_mirror0", "ar_cell_mirror1", "ar_pair"])
def test_fixture_of_cells(blocks, case):
    # Sub-cells as (prefix of the keys after "state" or "grad", mirrored).
    cells = {"ar_cell_mirror0": [("/", False)], "ar_cell_mirror1": [("/", True)]}.get(
        case, [("/cell1.", False), ("/cell2.", True)]
    )
    z = blocks[f"{case}/in0"].clone().requires_grad_()
    flat = {k.replace("/state/", "/state/."): v for k, v in blocks.items()} if case != "ar_pair" else blocks
    y, leaves = z, {}
    for prefix, mirror in cells:
        key = f"{case}/state{prefix}".removesuffix(".")
        weights, norms, bias = parameters(flat, key)
        y = flow_cell(y, *weight_norm(weights, norms, masks(4, 24, mirror)), bias)
        grad_prefix = f"{case}/grad{prefix}"
        for layer, weight, norm in zip(LAYERS, weights, norms, strict=True):
            leaves[f"{grad_prefix}{layer}.weight"] = weight
            leaves[f"{grad_prefix}{layer}.log_weight_norm"] = norm
        leaves[f"{grad_prefix}mu.conv_0.bias"] = bias
    torch.testing.assert_close(y, blocks[f"{case}/out_train"], rtol=1e-5, atol=1e-5)
    (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
    torch.testing.assert_close(z.grad, blocks[f"{case}/grad_in0"], rtol=1e-4, atol=1e-5)
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, blocks[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("mirror", [False, True])
def test_jacobian_is_unit_triangular(mirror):
    z, *rest = make(batch=1, mirror=mirror, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: flow_cell(t, *rest), z)
    # Order of dependence: positions in raster order (backwards when mirrored), channels within a position.
    order = torch.arange(z.numel()).view(2, 16).t()
    order = (order.flip(0) if mirror else order).flatten()
    ordered = jacobian.view(32, 32)[order][:, order]
    assert torch.equal(ordered.diagonal(), torch.ones(32, dtype=torch.float64))
    assert (ordered.triu(1) == 0).all() and (ordered.tril(-1) != 0).any()


def test_gradients_of_first_and_second_order():
    args = make(channels=1, batch=1, size=3, dtype=torch.float64)
    # Dense weights: masked ones give exact zeros before the first ELU, whose second derivative jumps at 0.
    g = torch.Generator().manual_seed(4)
    args = tuple(torch.randn(t.shape, generator=g, dtype=t.dtype).mul(0.5).requires_grad_() for t in args)
    assert gradcheck(flow_cell, args)
    assert gradgradcheck(flow_cell, args)


def test_strided_inputs_and_gradients():
    z, *rest = make(channels=3)
    buffer = torch.zeros(2, 5, 4, 6)
    buffer[:, 1:4, :, 2:] = z
    dense = z.requires_grad_()
    y = flow_cell(dense, *rest)
    for strided in (
        buffer[:, 1:4, :, 2:].requires_grad_(),
        z.detach().to(memory_format=torch.channels_last).requires_grad_(),
    ):
        out = flow_cell(strided, *rest)
        torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
        for dy in (torch.ones(1).expand(y.shape), torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)):
            expected = torch.autograd.grad(y, dense, dy, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(out, strided, dy, retain_graph=True), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16():
    args = make(channels=4, size=8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = flow_cell(*args)
    assert y.dtype == torch.bfloat16
    exact = composed(*(t.double() for t in args))
    error = (composed(*args).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * (error + torch.finfo(y.dtype).eps * exact.abs().max())
    # float32 inside, whatever autocast says: one rounding at the end.
    assert torch.equal(y, flow_cell(*(t.float() for t in args)).bfloat16())


def test_a_flow_of_the_reference():
    first, second = make(dtype=torch.float64), make(mirror=True, dtype=torch.float64)
    expected = composed(composed(*first), *second[1:])
    torch.testing.assert_close(flow_cells(first[0], *zip(first[1:], second[1:], strict=True)), expected)
    assert flow_cells(first[0], [], [], [], []) is first[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w[3].pop(), ValueError, "^2 w_in, 2 w_dw, 2 w_out, 1 bias_out: expected one of each for every cell$"),
        (lambda w: w[1].append(w[1].pop()[:5]), ValueError, r"^w_dw\[1\] of shape \(5, 1, 5, 5\): expected \(12, 1, 5, 5\)"),
        (
            lambda w: w[0].append(w[0].pop().double()),
            TypeError,
            r"^w_in\[1\] is torch.float64: .* torch.float32, as w_in\[0\]$",
        ),
        (lambda w: w[2].append(None) or w[2].pop(0), TypeError, r"^w_out\[1\] is None: expected a tensor$"),
    ],
)
def test_bad_flows(change, error, message):
    z, *cell = make()
    lists = [[w, w] for w in cell]
    change(lists)
    with pytest.raises(error, match=message):
        flow_cells(z, *lists)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 4, 4), r"z of shape \(2, 4, 4\)"),
        (1, torch.zeros(12, 3, 3, 3), r"w_in of shape \(12, 3, 3, 3\): expected \(12, 2, 3, 3\)"),
        (2, torch.zeros(12, 1, 3, 3), r"w_dw of shape .* expected \(12, 1, 5, 5\)"),
        (4, torch.zeros(3), r"bias_out of shape \(3,\): expected \(2,\)"),
        (1, torch.tensor(1.0), r"w_in of shape \(\): expected \(0, 2, 3, 3\)"),
        (
            4,
            torch.zeros(2, device="meta"),
            r"bias_out is on meta: expected cpu, where z is; move it there with \.to\(z\.device",
        ),
    ],
)
def test_bad_arguments(position, value, message):
    args = make()
    args[position] = value
    with pytest.raises(ValueError, match=message) as caught:
        flow_cell(*args)
    assert "\n" not in str(caught.value)
