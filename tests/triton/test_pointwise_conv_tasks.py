"""Gradients of a weight and a bias that several tasks share: who joins them, in what order, and with which tickets."""

from __future__ import annotations

import random

import pytest
import torch
from norms import tensor
from pointwise_parts import everything, tensors

tl = pytest.importorskip("triton.language")
from nvae_fast.kernels import _join, _triton  # noqa: E402
from nvae_fast.kernels.pointwise_conv import triton as launchers  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
SHAPE = 2, 5, 3, 7, 15, 10  # N, C, C beside, C_out, H, W: 300 rows are five tasks in float32, two in float16
ORDERS = {
    "as they come": range,
    "backwards": lambda n: range(n)[::-1],
    "mixed": lambda n: random.Random(n).sample(range(n), n),
}


@pytest.fixture
def joins(monkeypatch):
    """What the launches join: groups of two tasks or more, a few rows of two tasks at a time; nobody finds an earlier launch's
    parts."""
    found, real = [], launchers.join_tiles
    for name, value in (("TILES", 2), ("VALUES", tl.constexpr(64)), ("AHEAD", tl.constexpr(2))):
        monkeypatch.setattr(_join, name, value)

    def noted(*args):
        found.append(real(*args))
        if found[-1].parts is not None:
            found[-1].parts.fill_(torch.nan)
        return found[-1]

    monkeypatch.setattr(launchers, "join_tiles", noted)
    return found


def gradients(behind, dy=None):
    """(of the raw op, in float64); dweight first, and dbias but with a normalisation on either side (`behind`)"""
    x, weight, _, beside, _ = tensors(*SHAPE)
    dy = tensor(2, 7, 15, 10, seed=3) if dy is None else dy
    if behind:
        y, c, bn = tensor(2, 7, 15, 10, seed=1), tensor(3, 7, seed=3), tensor(5, 5, seed=4)
        du, dweight, table, _, _ = launchers.pointwise_conv_bwd(dy, y, c, x, bn, 0, weight[:, :5])
        g = c[0, :, None, None].double() * dy + c[1, :, None, None] * y.double() + c[2, :, None, None]
        a = x.double() * bn[3, :, None, None] + bn[4, :, None, None]
        return (dweight, du, table), (torch.einsum("bnhw,bkhw->nk", g, a)[..., None, None],)
    du, dweight, _, dbias, dbeside = launchers.pointwise_conv_bwd(dy, None, None, x, None, 0, weight, 0.0, True, None, beside)
    a = torch.cat((x, beside), 1).double()
    truth = torch.einsum("bnhw,bkhw->nk", dy.double(), a)[..., None, None], dy.double().sum((0, 2, 3))
    return (dweight, dbias, du, dbeside), truth


@pytest.mark.parametrize("behind", [False, True])
def test_the_same_bits_in_any_order_of_the_programs(shuffle, joins, behind):
    found = []
    for order in ORDERS.values():
        shuffle(order)
        ours, truth = gradients(behind)
        for a, b in zip(ours, truth, strict=False):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
        found.append(ours)
        assert not joins[-1].tickets.any()  # as the next launch expects them
    assert {(j.TASKS, j.GROUP) for j in joins} == {(5, 2)}  # of three groups
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_values_in_float16(check, joins):
    check(everything("elu"), tensors(*SHAPE), [], torch.float16, 5)
    assert {(j.TASKS, j.GROUP) for j in joins} == {(2, 2)}


def test_nan_stays_in_its_channel(joins):
    dy = tensor(2, 7, 15, 10, seed=3)
    dy[1, 4, 14, 9] = torch.nan
    dweight, dbias = gradients(False, dy)[0][:2]
    assert dweight.isnan().flatten(1).all(1).tolist() == dweight.isnan().flatten(1).any(1).tolist() == dbias.isnan().tolist()
    assert dbias.isnan().nonzero().tolist() == [[4]]


# Rows, C, C beside, C_out of published models -> tasks of the weight's gradient, one of which has nothing to join
PUBLISHED = {
    (8192, 256, 0, 1536): 2, (8192, 1536, 0, 256): 2, (8192, 256, 20, 256): 11, (8192, 256, 0, 40): 32,
    (32768, 128, 0, 768): 10, (256, 960, 0, 5760): 1, (256, 960, 20, 960): 1, (1024, 5760, 0, 480): 1, (4096, 240, 0, 1440): 1,
    (16384, 120, 0, 720): 10, (65536, 60, 0, 360): 37, (65536, 360, 0, 60): 20, (65536, 60, 20, 60): 64,
    (65536, 60, 0, 60): 128, (262144, 30, 0, 90): 128,
}  # fmt: skip


def test_published_sizes_take_the_tickets_that_launches_share(monkeypatch, joins):
    """More would be zeros of their own, a launch more. Parts stay in the second-level cache."""
    given = []

    def tickets(device, count):
        given.append(count)
        return torch.zeros(count, dtype=torch.int32, device=device)

    monkeypatch.setattr(_triton, "tickets", tickets)
    monkeypatch.setattr(launchers, "pointwise_conv_bwd_kernel", _Nothing())
    tasks = {}
    for rows, channels, more, out in PUBLISHED:
        x, dy, beside = (torch.empty(rows, n, 1, 1, dtype=torch.bfloat16, device="meta") for n in (channels, out, more))
        weight, bn = x.new_empty(out, channels + more, 1, 1), None if more else x.new_empty(5, channels, dtype=torch.float32)
        launchers.pointwise_conv_bwd(dy, None, None, x, bn, 1, weight, 0.0, True, None, beside if more else None)
        tasks[rows, channels, more, out] = joins[-1].TASKS
        assert joins[-1].parts is None or joins[-1].parts.nbytes < 6 << 20
    assert tasks == PUBLISHED and max(given) <= _triton.TICKETS


class _Nothing:
    def __getitem__(self, grid):
        return lambda *args, **sizes: None
