"""Operations counted for the roofline, and what has a place under it."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.benchmarks import cases, plot, report, roofline, suite
from nvae_fast.benchmarks.cases import Case

PIXELS = 2 * 6 * 6


@pytest.mark.parametrize(
    "op, channels, expected",
    [
        ("depthwise_conv", 8, 3 * 2 * 25 * 8 * PIXELS),  # forward, and a gradient of each input: two operations a tap
        ("pointwise_conv", 4, 3 * 2 * 4 * 24 * PIXELS),
        ("bn_act", 4, 4 * 4 * PIXELS),  # a norm, Swish, and the backward of both
        ("bn_swish_depthwise", 8, (3 * 2 * 25 + 4) * 8 * PIXELS),
    ],
)
def test_operations_of_the_plain_formulation(op, channels, expected):
    assert roofline.operations(Case("ops", op, (2, channels, 6, 6))) == expected


def test_every_op_has_operations_whatever_its_type():
    for case in cases.select("ops"):
        count = roofline.operations(case)
        assert count >= sum(t.numel() for t in case.inputs().leaves)
        assert count == roofline.operations(Case(case.suite, case.op, case.shape, torch.float64))


def test_products_and_functions_are_counted_views_and_copies_are_not():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with roofline.Operations() as counted:
        (a @ b).t().contiguous().exp().sum()
    assert counted.count == 2 * 3 * 4 * 5 + 15 + 15
    with roofline.Operations() as counted:
        torch.addmm(torch.ones(5), a, b)
        torch.bmm(a[None], b[None])
        torch.mv(a, b[:, 0])
    assert counted.count == 2 * (60 + 60 + 12)


def test_only_ops_of_known_bytes_and_right_numbers_have_a_place():
    row = {"suite": "ops", "phase": "fwd_bwd", "bytes": 8, "check": {"ok": True}}
    wrong = [{"suite": "cell"}, {"phase": "fwd"}, {"bytes": None}, {"check": {"ok": False}}]
    assert roofline.points([row, *(row | change for change in wrong)]) == [row]


def test_a_kept_run_is_drawn_memory_apart(tmp_path):
    pytest.importorskip("matplotlib")
    case = cases.select("ops", "pointwise_conv")[0]
    rows = suite.measure(case, rounds=3, device=torch.device("cpu"), copy_rate=1e9)
    held = [{"suite": "memory", "case": "m", "impl": "ours:fast", "shape": [n], "peak_bytes": n * 2**20, "largest_batch": 9,
             "per_image_bytes": 2**20, "budget_bytes": 9 * 2**20} for n in (1, 2)]  # fmt: skip
    document = {"cpu": "c", "threads": 1, "torch": "t", "rates": {"copy": 1e9, "products": 1e10}, "rows": rows + held}
    files = plot.save_all(document, tmp_path / "a.png")
    assert [f.name for f in files] == ["a.png", "a.memory.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    roofed = files[0].stat().st_size
    files = plot.save_all(document | {"rates": None, "rows": rows}, tmp_path / "b.png")
    assert [f.name for f in files] == ["b.png"] and files[0].stat().st_size < roofed


def test_a_dense_convolution_has_a_rate():
    assert report.product_rate(torch.device("cpu")) > 1e8
