"""Modules that compute in another order than their formula, against the formula (benchmarks/plain.py) in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, images, noise

from nvae_fast import InputError, cells
from nvae_fast.benchmarks.plain import PLAIN, plain
from nvae_fast.cells import FactorizedReduce, UpsampleProject


def outcome(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    leaves = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y, leaves, incoming)]


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=("channels-last", "NCHW"))
@pytest.mark.parametrize("channels", ((8, 16), (3, 7), (5, 4)))
@pytest.mark.parametrize("kind", (FactorizedReduce, UpsampleProject))
def test_a_rewritten_module_is_its_formula(within_budget, kind, channels, layout):
    torch.manual_seed(0)
    module = kind(*channels).to(memory_format=layout)
    x = torch.randn(3, channels[0], 6, 10).contiguous(memory_format=layout)
    exact = outcome(plain(copy.deepcopy(module)).double(), x.double())
    for triple in zip(outcome(module, x), outcome(plain(copy.deepcopy(module)), x), exact, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(6, 10), (1, 7), (2, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=("channels-last", "NCHW"))
def test_doubled_by_products_as_on_a_gpu(within_budget, monkeypatch, size, layout, dtype):
    torch.manual_seed(0)
    x, dy = (
        torch.randn(2, 5, *size).to(dtype).contiguous(memory_format=layout),
        torch.randn(2, 5, 2 * size[0], 2 * size[1]).to(dtype),
    )

    def outcome(products, dtype=dtype):
        monkeypatch.setattr(cells, "by_products", lambda device: products)
        leaf = x.to(dtype).detach().requires_grad_()
        y = cells.doubled(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    found = outcome(True)
    assert found[0].is_contiguous(memory_format=torch.channels_last) and found[0].dtype == dtype
    for triple in zip(found, outcome(False), outcome(False, torch.float64), strict=True):
        within_budget(*triple, dtype)
    monkeypatch.setattr(cells, "by_products", lambda device: True)
    assert (cells.doubled(torch.ones_like(x)) == 1).all()  # the shares of a pixel are 1 together, in any type


def test_where_images_are_doubled_by_products():
    assert cells.by_products(torch.device("cuda", 1)) and not cells.by_products(torch.device("cpu"))


def test_a_whole_model_is_its_formulas(within_budget):
    model, x, z = build().to(memory_format=torch.channels_last).eval(), images(), noise()
    x = x.contiguous(memory_format=torch.channels_last)
    rival = plain(copy.deepcopy(model))
    changed = {type(m) for m in model.modules()} & set(PLAIN)
    assert changed == set(PLAIN) and not {type(m) for m in rival.modules()} & set(PLAIN)
    exact = copy.deepcopy(rival).double()(x.double(), [t.double() for t in z])
    for triple in zip(model(x, z), rival(x, z), exact, strict=True):
        within_budget(*triple)


def test_odd_sides_cannot_be_halved():
    with pytest.raises(InputError, match="7x8 cannot be halved: expected even sides"):
        FactorizedReduce(4, 8)(torch.zeros(1, 4, 7, 8))


def test_a_pixel_that_is_not_a_number_stays_in_its_place():
    module, x = FactorizedReduce(4, 8), torch.ones(1, 4, 6, 8)
    x[0, 2, 3, 5] = torch.nan
    expected = torch.zeros(1, 8, 3, 4, dtype=torch.bool)
    expected[0, :, 1, 2] = True
    assert torch.equal(module(x).isnan(), expected)
