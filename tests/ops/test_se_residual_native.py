"""se_residual's native code: values and gradients against float64, a normalisation on the way in, statistics on the way out."""

from __future__ import annotations

import pytest
import torch
from norms import bn_act, check, check_stats, image, needs_native, norm, outcome, same, se, se_tensors, tensor

from nvae_fast import functional as F
from nvae_fast.kernels.se_residual.ops import SEResidual

pytestmark = needs_native
# N, C, H, W, hidden
SHAPES = [
    (2, 37, 5, 6, 4),
    (1, 1, 5, 1, 1),
    (3, 7, 1, 1, 4),
    (2, 30, 3, 2, 5),
    (2, 33, 4, 4, 7),
    (1, 90, 9, 5, 17),
    (2, 600, 3, 3, 37),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, gate, dtype):
    tensors = se_tensors(*shape)
    check(lambda t, n, i: se(t, n, i, residual_scale=0.3), tensors if gate else tensors[:2], [], within_budget, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_bias_of_x(within_budget, shape, gate, dtype):
    tensors, bias = se_tensors(*shape), tensor(shape[1], shift=1.0, seed=3)
    call = lambda t, n, i: se(t, n, i, residual_scale=0.3)  # noqa: E731
    check(call, [*(tensors if gate else tensors[:2]), bias], [], within_budget, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_means_that_were_taken_before(within_budget, shape, dtype):
    """Of x alone, beside a bias; and they are what the gate is made of."""

    def call(t, n, impl):
        means = None if impl == "reference" else t[1].detach().float().mean((2, 3))
        return se(t, n, impl, x_means=means)

    args = [*se_tensors(*shape), tensor(shape[1], shift=1.0, seed=3)]
    check(call, args, [], within_budget, dtype)
    wrong = torch.full(shape[:2], 3.0)
    assert not torch.equal(se(args, [], "cpu", x_means=wrong), se(args, [], "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[2] * s[3] > 1], ids=str)
def test_statistics_of_the_output(shape, gate, dtype):
    tensors = se_tensors(*shape)
    args = [t.to(dtype) for t in tensors[:2]] + (tensors[2:] if gate else [None] * 4)
    y, stats = F.se_residual(*args, return_stats=True, impl="cpu")
    assert torch.equal(y, F.se_residual(*args, impl="cpu"))
    check_stats(stats, y)


def test_statistics_feed_the_normalisation_behind_it():
    """return_stats and Norm(stats=...): the same numbers as taking them again, in every op that takes a norm."""
    skip, x, *gate = se_tensors(2, 20, 6, 5)
    y, stats = F.se_residual(skip, x, *gate, return_stats=True, impl="cpu")
    n, w1, wd = norm(20), tensor(9, 20, 1, 1), tensor(20, 1, 3, 3)
    calls = {
        "bn_act": lambda t, n, i: F.bn_act(t[0], *n[0][:5], training=True, stats=n[0].stats, impl=i),
        "pointwise": lambda t, n, i: F.pointwise_conv(t[0], w1, norm=n[0], act="swish", impl=i),
        "depthwise": lambda t, n, i: F.depthwise_conv(t[0], wd, norm=n[0], act="swish", impl=i),
    }
    for name, call in calls.items():
        taken, given = (outcome(call, [y], [m], "cpu") for m in (n, n._replace(stats=stats)))
        for key, t in taken.items():
            torch.testing.assert_close(given[key], t, rtol=1e-5, atol=1e-6, msg=lambda m, k=key, n=name: f"{n} {k}: {m}")


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalisation_on_the_way_in(within_budget, dtype, gate):
    """bn is an affine map per channel of which rows 3 (scale) and 4 (shift) take the gradients of scale and bias."""
    tensors = se_tensors(2, 33, 4, 5)
    mean, scale, bias = tensor(33, shift=1.0), tensor(33, shift=1.0, seed=1), tensor(33, seed=2)
    x = tensors[1]

    def call(t, n, impl):
        x, scale, bias = t[:3]
        m = mean.to(scale.dtype)
        gates = t[4:] if gate else (None,) * 4
        if impl == "reference":
            v = ((x.to(scale.dtype) - m[:, None, None]) * scale[:, None, None] + bias[:, None, None]).to(x.dtype)
            return F.se_residual(t[3], v, *gates, impl=impl)
        bn = Affine.apply(m, scale, bias)
        return F.se_residual(t[3], x, *gates, bn=bn, impl=impl)

    wide = torch.float32  # the table is float32 with any storage; `check` converts what it is given
    images = [x, tensors[0]]
    args = [images[0], scale, bias, images[1], *(tensors[2:] if gate else [])]

    def stored(t, n, impl):
        narrow = [s.to(dtype) if i in (0, 3) and s.dtype == wide else s for i, s in enumerate(t)]
        return call(narrow, n, impl)

    if dtype == torch.float32:
        check(stored, args, [], within_budget)
        return
    got, plain, exact = (outcome(stored, [a.to(d) for a in args], [], i) for d, i in
                         ((wide, "cpu"), (wide, "reference"), (torch.float64, "reference")))  # fmt: skip
    for name, truth in exact.items():
        error, other = ((t[name].double() - truth).abs().max() for t in (got, plain))
        assert error <= 2 * (other + torch.finfo(dtype).eps * truth.abs().max()), name


class Affine(torch.autograd.Function):
    """The table [5, C] of a normalisation, and the gradients of its rows 3 and 4 as those of scale and bias."""

    @staticmethod
    def forward(ctx, mean, scale, bias):
        zero = torch.zeros_like(mean)
        return torch.stack((mean, zero, zero, scale, bias - mean * scale))

    @staticmethod
    def backward(ctx, dbn):
        return None, dbn[3], dbn[4]


def test_mixed_dtypes_take_the_wider_one():
    skip, x, *gate = se_tensors(2, 9, 4, 3)
    y = F.se_residual(skip, x.bfloat16(), *gate, impl="cpu")
    assert y.dtype == torch.float32 and torch.equal(y, F.se_residual(skip, x, *gate, impl="cpu"))
    leaves = [skip.clone().requires_grad_(), x.bfloat16().requires_grad_()]
    F.se_residual(*leaves, *gate, impl="cpu").sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32, torch.bfloat16]


def test_nan_stays_in_its_image():
    for impl in ("cpu", "reference"):
        args = se_tensors(3, 9, 4, 3)
        args[1][1, 4, 2, 1] = torch.nan
        y = F.se_residual(*args, impl=impl)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
        args[2:] = [None] * 4
        y = F.se_residual(*args, impl=impl)
        assert y[1, 4, 2, 1].isnan() and y.isnan().sum() == 1


def test_nan_reaches_the_gradients_that_it_reaches_in_torch():
    args = se_tensors(3, 9, 4, 3)
    args[1][1, 4, 2, 1] = torch.nan
    found, expected = (outcome(se, args, [], impl) for impl in ("cpu", "reference"))
    for name, t in expected.items():
        assert torch.equal(found[name].isnan(), t.isnan()), name
    assert expected["d3"].isnan().any() and not expected["d1"].isnan().all()


def test_an_open_gate_keeps_the_digits_of_its_slope():
    """1 - gate of a gate that is rounded has lost those that say how far from 1 it is."""
    args = se_tensors(2, 33, 4, 5)
    args[5] = args[5] + 10.0
    exact, got = (
        outcome(se, [t.to(d) for t in args], [], i)["d5"] for d, i in ((torch.float64, "reference"), (torch.float32, "cpu"))
    )
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_sums_over_a_large_image_keep_their_digits():
    """22,500 blocks of pixels that all have one sign: added up one by one they would lose four bits."""
    skip, x, *gate = se_tensors(1, 3, 600, 600)
    x = (1 + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).contiguous(memory_format=torch.channels_last)
    state = torch.ops.nvae_fast.se_residual_fwd(skip, x, None, *gate, None, 0.1, False)[1]
    mean = x.double().mean((2, 3))
    assert ((state[:, :3] - mean) / mean).abs().max() <= 2 * torch.finfo(torch.float32).eps
    found = []
    for dtype, impl in ((torch.float32, "cpu"), (torch.float64, "reference")):
        *args, b2 = (t.to(dtype) for t in (skip, x, *gate))
        found += torch.autograd.grad(F.se_residual(*args, b2.requires_grad_(), impl=impl).sum(), b2)
    assert ((found[0] - found[1]) / found[1]).abs().max() <= 5e-7


def test_an_expanded_skip_and_its_gradient():
    x = image(2, 9, 4, 3)
    zero = torch.zeros((), requires_grad=True)
    y = F.se_residual(zero.expand_as(x), x, *(None,) * 4, residual_scale=1.0, impl="cpu")
    assert torch.equal(y, x)
    y.sum().backward()
    assert zero.grad == x.numel()


def test_auto_takes_the_native_code_for_channels_last_images_only():
    args = se_tensors(2, 9, 4, 3)
    same(outcome(se, args, [], "auto"), outcome(se, args, [], "cpu"))
    args[0] = args[0].contiguous()
    same(outcome(se, args, [], "auto"), outcome(se, args, [], "reference"))


def test_compiled_the_node_lends_nothing():
    """What it lends on a GPU (_lent.py) would break the graph; here nobody could take it."""
    leaves, n = [t.requires_grad_() for t in se_tensors(2, 9, 4, 3)], norm(9)

    def two(lends, skip, x, *gate):
        y, _ = SEResidual.apply(skip, x, None, *gate, None, 0.1, lends, False)
        return bn_act([y], [n], "cpu")

    found = [two(False, *leaves), torch.compile(two, fullgraph=True, backend="aot_eager")(True, *leaves)]
    for ours, compiled in zip(*(torch.autograd.grad(y, leaves, tensor(2, 9, 4, 3)) for y in found), strict=True):
        assert torch.equal(ours, compiled)
    with pytest.raises(NotImplementedError, match="se_residual_dy_"):
        torch.autograd.grad(two(True, *leaves), leaves, tensor(2, 9, 4, 3))


def test_shapes_of_the_two_passes_that_a_gpu_alone_has():
    y, x, w1, _, w2, _ = (t.to("meta") for t in se_tensors(2, 9, 4, 3))
    state, bn, c = (torch.empty(shape, device="meta") for shape in ((2, 3 * 9 + 4), (5, 9), (3, 9)))
    raw = torch.ops.nvae_fast
    shares = raw.se_residual_dy_(y, None, y, None, 0, c, None, None, x, bn, w1, w2, state, 0.1)
    assert shares.shape == (2, 4 * 9 + 4) and shares.dtype == torch.float32
    found, alike = (raw.se_residual_dx(y, bn, w1, w2, state, shares, 0.1), raw.se_residual_bwd(y, x, bn, w1, w2, state, 0.1))
    assert [t.shape for t in found] == [t.shape for t in alike] and len(found) == 6
