"""weight_norm's Triton kernels: values and gradients against float64, layouts, rows of zeros, empty weights."""

from __future__ import annotations

import pytest
import torch
from weight_norms import LARGE, LAYOUTS, SHAPES, incoming, make, run

from nvae_fast.kernels import _lists
from nvae_fast.kernels.weight_norm import weight_norm

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def within(within_budget, weights, norms, masks, impl="triton"):
    grads = incoming(weights)
    exact = run(*([t.double() for t in ts] for ts in (weights, norms)), masks, "reference", [g.double() for g in grads])
    found, plain = (run(weights, norms, masks, who, grads) for who in (impl, "reference"))
    for triple in zip(found, plain, exact, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize(("dtype", "size"), [(FLOAT, 1.0), (FLOAT, 1e-6), (FLOAT, 1e6), (HALF, 1.0), (BFLOAT, 1.0)], ids=str)
def test_values_and_gradients(within_budget, dtype, size):
    weights, norms, masks = make(dtype, [*SHAPES, *LARGE, (9, 16), (3, 1030, 1, 1)])
    within(within_budget, [size * w for w in weights], norms, masks)


def test_types_may_be_mixed(within_budget):
    weights, norms, masks = make(shapes=[*SHAPES, (9, 16), (5, 3, 3, 3)])
    kinds = [FLOAT, HALF, FLOAT, HALF, FLOAT, FLOAT]
    within(within_budget, [w.to(kind) for w, kind in zip(weights, kinds, strict=True)], [*norms[:5], norms[5].half()], masks)


@pytest.mark.parametrize("arranged", ["weights", "norms", "grads", "all"])
def test_any_strides(arranged):
    plain = dict(zip(("weights", "norms", "masks"), make(shapes=[(9, 3, 3, 3), *SHAPES[1:]]), strict=True))
    plain["grads"] = incoming(plain["weights"])
    expected = run(**plain, impl="triton")
    for layout in LAYOUTS.values():
        inputs = dict(plain)
        for name in plain if arranged == "all" else [arranged]:
            inputs[name] = [None if t is None else layout(t) for t in plain[name]]
        found = run(**inputs, impl="triton")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for effective, w in zip(found, inputs["weights"], strict=False):
            assert effective.stride() == torch.empty_like(w).stride()


def test_wide_and_narrow_accesses_and_reruns_give_the_same_bits(monkeypatch):
    args = make(shapes=[(4, 8, 3, 3), (5, 16), (11, 520)])
    wide, again = run(*args, "triton"), run(*args, "triton")
    monkeypatch.setattr(_lists, "aligned", lambda columns, *tensors: False)
    assert all(map(torch.equal, wide, again)) and all(map(torch.equal, wide, run(*args, "triton")))


def test_one_at_a_time_is_all_at_once():
    weights, norms, masks = make()
    together = weight_norm(weights, norms, masks, impl="triton")
    for y, *item in zip(together, weights, norms, masks, strict=True):
        assert torch.equal(y, weight_norm(*([t] for t in item), impl="triton")[0])


def test_only_weights_that_were_used_have_gradients():
    found = []
    for impl in ("triton", "reference"):
        leaves = [[t.requires_grad_() for t in ts] for ts in make()[:2]]
        out = weight_norm(*leaves, make()[2], impl=impl)
        found.append(torch.autograd.grad(out[1].square().sum() + out[2].sum(), sum(leaves, []), allow_unused=True))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert (a is None) == (b is None) == (i % 4 not in (1, 2))
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_nan():
    weight = torch.randn(5, 2, 3, 3)
    weight[2], weight[3, 1, 2, 0] = 0, torch.nan
    weight[4] *= 1e-25  # whose squares are 0
    mask, norm, dy = torch.ones_like(weight), torch.zeros(5, 1, 1, 1), torch.randn_like(weight)
    mask[1] = 0
    found = run([weight], [norm], [mask], "triton", [dy])
    effective, dw, dl = found
    assert (effective[1:3] == 0).all() and (dw[1] == 0).all() and (dl[1:3] == 0).all()
    for t in found:
        assert t[3].isnan().all() and t[[0, 1, 2, 4]].isfinite().all()
    torch.testing.assert_close(dw[2], dy[2] / 1e-5)
    for a, b in zip(found, run([weight], [norm], [mask], "reference", [dy]), strict=True):
        torch.testing.assert_close(a[[0, 1, 2, 4]], b[[0, 1, 2, 4]], rtol=1e-5, atol=1e-5)


def test_empty_weights():
    weights, norms, _ = make(shapes=[(0, 3, 3, 3), (2, 0), (3, 2)])
    found = run(weights, norms, None, "triton")
    assert [t.shape for t in found] == [t.shape for t in (*weights, *weights, *norms)]
    assert all(t.isfinite().all() for t in found) and (found[-2] == 0).all()
    assert all(not t.numel() for t in run(weights[:1], norms[:1], None, "triton"))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (1, torch.zeros(2, 3), r"log_norms\[0\] has shape \(2, 3\) .*expected \(2, 1\)"),
        (
            2,
            torch.ones(2, 3).bool(),
            r"masks\[0\] has shape \(2, 3\) and type torch.bool .*expected \(2, 3\) and torch.float32",
        ),
    ],
)
def test_wrong_arguments(position, wrong, message):
    args = [[torch.ones(2, 3)], [torch.zeros(2, 1)], [None], 1e-5]
    args[position] = [wrong]
    with pytest.raises(RuntimeError, match=message) as caught:
        torch.ops.nvae_fast.weight_norm_fwd(*args)
    assert "\n" not in str(caught.value)
