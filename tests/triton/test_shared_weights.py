"""shared_weights' Triton kernels: values and gradients against float64, layouts, terms, refusals, launches."""

from __future__ import annotations

import pytest
import torch
from sharings import compare, run

from nvae_fast.kernels import _lists
from nvae_fast.kernels.shared_weights import SharedWeights

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("low", "of_weights", "of_grads"),
    [
        *((low, "channels_last", "channels_last") for low in (FLOAT, HALF)),
        (HALF, "channels_last", "contiguous"),
        (FLOAT, "contiguous", "every second"),
        (HALF, "transposed", "channels_last"),
        (FLOAT, "every second", "transposed"),
    ],
    ids=str,
)
def test_values_and_gradients(within_budget, low, of_weights, of_grads):
    compare(within_budget, "triton", low, of_weights, of_grads)


def test_bfloat16():
    """The interpreter cuts what a GPU rounds."""
    for mine, plain in zip(run("triton", BFLOAT), run(None, BFLOAT), strict=True):
        for a, b in zip(mine, plain, strict=True):
            assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


def test_wide_and_narrow_accesses_and_reruns_give_the_same_bits(monkeypatch):
    (values, grads), again = run("triton", HALF, of_weights="channels_last"), run("triton", HALF, of_weights="channels_last")
    monkeypatch.setattr(_lists, "aligned", lambda columns, *tensors: False)
    narrow = run("triton", HALF, of_weights="channels_last")
    assert all(t.data_ptr() % 16 == 0 for t in (*values, *grads) if t is not None)
    for other in (again, narrow):
        for a, b in zip((*values, *grads), (*other[0], *other[1]), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_more_values_than_a_program_has():
    """A weight of several programs, none of which begins with a row, with a term and in another order than v."""
    torch.manual_seed(0)
    weight = torch.randn(7, 70, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    u, v, g = torch.randn(7), torch.randn(630), torch.randn(7, 70, 3, 3).contiguous(memory_format=torch.channels_last)
    shared = SharedWeights([weight], [None], [None], [HALF], impl="triton")
    assert torch.equal(shared.values[0], weight.to(HALF)) and shared.values[0].stride() == weight.stride()
    shared.terms[0] = "spectral", u, v
    ((shared.values[0] * g.to(HALF)).float().sum() + 0.5 * shared.claim("spectral")).backward()
    torch.testing.assert_close(weight.grad, g.to(HALF).float() + 0.5 * torch.outer(u, v).view(7, 70, 3, 3))
    assert weight.grad.stride() == weight.stride()


def test_a_handful_of_launches(launches):
    """One forward for each type of value, normalised or not; one backward for each type of gradient, terms among them."""
    with launches() as names:
        run("triton", BFLOAT, of_weights="channels_last", of_grads="channels_last")
    kernels = [name for name in names if name.endswith("_kernel")]
    assert kernels.count("weight_norm_fwd_kernel") == kernels.count("weight_norm_bwd_kernel") == 2
    assert kernels.count("shared_weights_fwd_kernel") == 1 and kernels.count("shared_weights_bwd_kernel") == 2
    assert len(kernels) == 7


def test_nan_stays_where_it_is():
    weight, gamma = torch.ones(3, 4, requires_grad=True), torch.ones(5, requires_grad=True)
    shared = SharedWeights([weight, gamma], [None] * 2, [None] * 2, [HALF, FLOAT], impl="triton")
    shared.terms.update({0: ("spectral", torch.ones(3), torch.ones(4)), 1: ("norm", None, torch.ones(5))})
    factor = torch.tensor(torch.nan)
    (shared.values[0].float().sum() + shared.values[1].sum() + factor * shared.claim("norm")).backward()
    assert (weight.grad == 1).all() and gamma.grad.isnan().all()  # a regulariser that nothing uses adds nothing


def test_wrong_arguments():
    raw, one = torch.ops.nvae_fast, torch.ones
    item = [one(2, 3)], [None], [None]
    for call, message in (
        (lambda: raw.shared_weights_bwd([one(2, 3)], *item, [None], [], [None], 1e-5), "1 weights: expected as many gradients"),
        (lambda: raw.shared_weights_bwd([one(3, 2)], *item, *[[None]] * 3, 1e-5), r"grads\[0\] has shape \(3, 2\).*expected 6"),
        (lambda: raw.shared_weights_bwd([None], *item, [one(())], [one(2)], [one(2)], 1e-5), r"v\[0\] has shape \(2,\)"),
        (lambda: raw.shared_weights_bwd([None], *item, [one(())], [one(2)], [one(3).half()], 1e-5), r"v\[0\] is torch.float16"),
        (lambda: raw.shared_weights_bwd([None], *item, [None], [None], [one(3)], 1e-5), r"v\[0\] without factors\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
