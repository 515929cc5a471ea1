"""The native logistic_mixture_log_prob over layouts and empty inputs; what it keeps, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from mixtures import DTYPES, make, native, run

from nvae_fast.kernels.logistic_mixture import logistic_mixture_log_prob

pytestmark = native


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda t: torch.cat([t, t], 1).chunk(2, 1)[1],
    "half of the channels, channels_last": lambda t: LAYOUTS["channels_last"](torch.cat([t, t], 1)).chunk(2, 1)[0],
    "window of a larger map": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


BAD = {
    "20 channels, expected 30 for 3 channels of x and 3 mixtures": lambda x, p: (x, p, 3, 8, True),
    "takes x .* and params": lambda x, p: (x[:, :, :1], p, 2, 8, True),
    "takes x in float32": lambda x, p: (x, p.double(), 2, 8, True),
    "takes 1 to 8 bits, not 9": lambda x, p: (x, p, 2, 9, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_back(layout, dtype):
    arrange = LAYOUTS[layout]
    x, params = make(mixtures=3, size=(2, 13, 12), dtype=dtype)
    grad = torch.randn(2, 13, 12)
    plain = run(x, params, "cpu", 3, grad=grad)
    # One gradient in each layout: cut from a tensor with a channel in front of the pixels.
    strided = run(arrange(x), arrange(params), "cpu", 3, grad=arrange(grad[:, None].expand(-1, 3, -1, -1))[:, 1])
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_a_low_precision_gradient_is_rounded_to_nearest(layout):
    x, params = make(mixtures=3, size=(2, 13, 12))
    wide, low = (run(x, LAYOUTS.get(layout, torch.clone)(p), "cpu", 3) for p in (params, params.bfloat16()))
    assert torch.equal(low[0], wide[0]) and torch.equal(low[1], wide[1].bfloat16())


def test_expanded_params_and_gradients():
    x, params = make(size=(4, 6, 5))
    small = params[:1, :, :1, :1].clone().requires_grad_()
    for expanded in (small.expand(params.shape), small.expand(4, -1, 1, 1).expand(params.shape)):
        grads = [
            torch.autograd.grad(logistic_mixture_log_prob(x, expanded, num_mixtures=2, impl=impl).sum(), small)[0]
            for impl in ("cpu", "reference")
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    grad = torch.randn(4, 1, 5)
    dense, expanded = (run(x, params, "cpu", grad=g) for g in (grad.expand(4, 6, 5).contiguous(), grad.expand(4, 6, 5)))
    assert torch.equal(dense[1], expanded[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_opcheck(layout, dtype):
    arrange = LAYOUTS.get(layout, torch.Tensor.contiguous)
    x, params = make(dtype=dtype)
    args = (arrange(x), arrange(params), 2, 8, True)
    torch.library.opcheck(torch.ops.nvae_fast.logistic_mixture_log_prob_fwd, args)
    torch.library.opcheck(torch.ops.nvae_fast.logistic_mixture_log_prob_bwd, (torch.randn(2, 7, 5).mT, *args))


def test_keeps_nothing_but_its_inputs():
    x, params = make()
    params.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        logistic_mixture_log_prob(x, params, num_mixtures=2, impl="cpu")
    assert set(kept) == {x.data_ptr(), params.data_ptr()}


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(size):
    x, params = torch.zeros(size[0], 3, *size[1:]), torch.zeros(size[0], 20, *size[1:])
    out, grad = run(x, params, "cpu")
    assert out.shape == size and grad.shape == params.shape


@pytest.mark.parametrize("message", BAD)
def test_the_op_checks_what_it_reads(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nvae_fast.logistic_mixture_log_prob_fwd(*BAD[message](*make()))


def test_the_op_checks_the_gradient():
    x, params = make()
    for grad in (torch.zeros(2, 5, 6), torch.zeros(2, 5, 7, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="a gradient of shape .* does not fit x of shape"):
            torch.ops.nvae_fast.logistic_mixture_log_prob_bwd(grad, x, params, 2, 8, True)
