"""Bad arguments of the ops with a batch normalisation: one line with the value, the expectation and the cure."""

from __future__ import annotations

import pytest
import torch
from norms import branch_norms, branch_tensors, image, needs_native, norm, se_tensors, tensor

from nvae_fast import functional as F

X = (2, 6, 5, 4)


def bn_act(x=None, norm=None, act="swish", **options):
    n = norm
    return F.bn_act(x, *n[:5], training=n.training, momentum=n.momentum, eps=n.eps, stats=n.stats, act=act, **options)


def depthwise(x=None, norm=None, act="swish", **options):
    return F.depthwise_conv(x, options.pop("weight", tensor(6, 1, 3, 3)), norm=norm, act=act, **options)


def pointwise(x=None, norm=None, act="swish", **options):
    return F.pointwise_conv(x, options.pop("weight", tensor(4, 6, 1, 1)), norm=norm, act=act, **options)


def branch(x=None, norm=None, **options):
    weights = dict(zip(("expand", "depthwise", "project"), branch_tensors(2, 6, 8, 5, 5, 4)[1:], strict=True))
    norms = [norm, *branch_norms(6, 8, 5)[1:]]
    return F.inverted_residual(x, **(weights | {"norms": norms} | options))


def se(x=None, norm=None, **options):
    args = dict(zip(("skip", "x", "w1", "b1", "w2", "b2"), se_tensors(*X), strict=True))
    return F.se_residual(**(args | {"x": x} | options))


WITH_NORM = [bn_act, depthwise, pointwise, branch]
impls = pytest.mark.parametrize("impl", ["auto", pytest.param("cpu", marks=needs_native), "reference"])


def refusal(op, impl, **change):
    """The message, in one line, of what `op` raises."""
    arguments = {"x": image(*X), "norm": norm(6), "impl": impl} | change
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        op(**arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 220
    return message


@impls
@pytest.mark.parametrize("op", [*WITH_NORM, se])
def test_x(op, impl):
    assert "(6, 5, 4)" in refusal(op, impl, x=image(*X)[0])
    assert "torch.int64: expected a floating-point" in refusal(op, impl, x=image(*X).long())
    assert "expected" in refusal(op, impl, x=image(2, 5, 5, 4))
    message = refusal(op, impl, x=image(*X).to("meta"))
    assert "meta" in message and ("they must be alike" in message or "move it there" in message)


@impls
@pytest.mark.parametrize("op", WITH_NORM)
def test_norm(op, impl):
    n = norm(6)
    cases = {
        "eps -1.0: expected a number >= 0, such as 1e-5": n._replace(eps=-1.0),
        "eps nan: expected a number >= 0": n._replace(eps=float("nan")),
        "momentum 2.0: expected a number from 0 to 1, or None": n._replace(momentum=2.0),
        "pass num_batches_tracked, or a momentum": n._replace(momentum=None, num_batches_tracked=None),
        "expected both or neither; pass None for both": n._replace(running_var=None),
        "weight of shape (5,): expected (6,)": n._replace(weight=tensor(5)),
        "running_mean of shape (1, 6): expected (6,)": n._replace(running_mean=tensor(1, 6)),
        "stats of shape (2, 5): expected (2, 6)": n._replace(stats=tensor(2, 5)),
        "bias is torch.int64: expected a floating-point tensor; convert it with .float()": n._replace(bias=n.bias.long()),
        "weight is on meta: expected cpu, where x is; move it there": n._replace(weight=n.weight.to("meta")),
        "running_var is on meta: expected cpu": n._replace(running_var=n.running_var.to("meta")),
        "stats is on meta: expected cpu": n._replace(stats=torch.zeros(2, 6, device="meta")),
    }
    for words, bad in cases.items():
        assert words in refusal(op, impl, norm=bad)


@impls
@pytest.mark.parametrize("op", [bn_act, depthwise, pointwise])
def test_activation_and_a_single_value(op, impl):
    assert "act 'relu': expected one of identity, swish, elu" in refusal(op, impl, act="relu")
    message = refusal(op, impl, x=image(1, 6, 1, 1))
    assert "(1, 6, 1, 1): batch statistics need more than 1 value per channel; use a larger batch or training=False" in message


@impls
def test_up_sampling_makes_four_values_of_one(impl):
    assert depthwise(image(1, 6, 1, 1), norm(6), upsample=2, impl=impl).isfinite().all()


@impls
def test_weights_of_convolutions(impl):
    say = lambda op, **change: refusal(op, impl, **change)  # noqa: E731
    assert "expected [C_out, 6, 1, 1]" in say(pointwise, weight=tensor(4, 5, 1, 1))
    assert "weight has shape (): expected [C_out" in say(pointwise, weight=torch.tensor(1.0))
    assert "weight has shape (): expected [6, 1, k, k] with k odd" in say(depthwise, weight=torch.tensor(1.0))
    assert "expected [6, 1, k, k] with k odd" in say(depthwise, weight=tensor(6, 1, 4, 4))
    assert "with k odd" in say(depthwise, weight=torch.zeros(6, 1, 0, 0))
    assert "act 'swish' without norm: pass the normalisation before it" in say(depthwise, norm=None, weight=tensor(6, 1, 3, 3))
    for op, shape in ((pointwise, (4, 6, 1, 1)), (depthwise, (6, 1, 3, 3))):
        assert "they must be alike" in say(op, weight=tensor(*shape).double())
        assert "weight torch.float32 on meta" in say(op, weight=tensor(*shape).to("meta"))
    assert "stride=3, dilation=1: expected stride 1 or 2" in say(depthwise, stride=3)
    assert "upsample=2 with stride=2: expected 1, or 2 with stride 1" in say(depthwise, stride=2, upsample=2)
    assert "upsample=0 with stride=1" in say(depthwise, upsample=0)


@impls
def test_inverted_residual(impl):
    say = lambda **change: refusal(branch, impl, **change)  # noqa: E731
    assert "expand has shape (8, 5, 1, 1): expected (8, 6, 1, 1) for x of 6 channels" in say(expand=tensor(8, 5, 1, 1))
    assert "project has shape (): expected the 4 dimensions" in say(project=torch.tensor(1.0))
    assert "depthwise has a kernel of 4 x 4: expected an odd size" in say(depthwise=tensor(8, 1, 4, 4))
    assert "expand torch.float32 on meta: they must be alike" in say(expand=tensor(8, 6, 1, 1).to("meta"))
    assert "project torch.float64 on cpu: they must be alike" in say(project=tensor(5, 8, 1, 1).double())
    assert "stride=2, upsample=2: expected 1 or 2, and not both 2" in say(stride=2, upsample=2)
    assert "memory 'none': expected one of fast, balanced, low" in say(memory="none")
    assert "3 norms: expected 4" in say(norms=branch_norms(6, 8, 5)[:3])
    assert "more than 1 value per channel" in say(x=image(1, 6, 2, 2), stride=2)
    for i in range(4):  # that one alone takes the batch's
        norms = [n._replace(training=i == j) for j, n in enumerate(branch_norms(6, 8, 5))]
        assert "more than 1 value per channel" in say(x=image(1, 6, 1, 1), norms=norms)


@impls
def test_se_residual(impl):
    say = lambda **change: refusal(se, impl, **change)  # noqa: E731
    assert "skip is on meta: expected cpu, where x is" in say(skip=image(*X).to("meta"))
    assert "w1 is on meta: expected cpu, where x is" in say(w1=torch.zeros(4, 6, device="meta"))
    assert "w2 is torch.int64: expected a floating-point tensor" in say(w2=torch.zeros(6, 4, dtype=torch.int64))
    assert "w1 of shape ()" in say(w1=torch.tensor(1.0))
    assert "b1 is None: expected all of w1, b1, w2, b2, or none" in say(b1=None)
    assert "bn of shape (5, 7) and torch.float32: expected float32 (5, 6)" in say(bn=tensor(5, 7))
    assert "bn of shape (5, 6) and torch.float64: expected float32 (5, 6)" in say(bn=tensor(5, 6).double())
    assert "bn is on meta" in say(bn=torch.zeros(5, 6, device="meta"))


@needs_native
@pytest.mark.parametrize("op", [*WITH_NORM, se])
def test_a_named_implementation_that_cannot_run(op):
    half = (
        {"weight": tensor(6, 1, 3, 3).half()}
        if op is depthwise
        else {"weight": tensor(4, 6, 1, 1).half()}
        if op is pointwise
        else {}
    )
    if op is branch:
        half = {
            name: t.half()
            for name, t in zip(("expand", "depthwise", "project"), branch_tensors(2, 6, 8, 5, 5, 4)[1:], strict=True)
        }
    if op is se:
        half = {"skip": image(*X).half()}
    message = refusal(op, "cpu", x=image(*X).half(), **half)
    assert "impl='cpu' cannot run: it takes float32 or bfloat16, not float16; impl='auto' picks one that can" in message
    assert "impl='triton' cannot run: it takes cuda tensors, not cpu; impl='auto' picks one" in refusal(op, "triton")
    if op in (depthwise, branch):
        assert "impl='cuda' cannot run: it takes cuda tensors, not cpu; impl='auto' picks one" in refusal(op, "cuda")
    else:
        assert "has no 'cuda' implementation: use impl='auto' or one of " in refusal(op, "cuda")
    assert "unknown impl 'fast': expected one of auto" in refusal(op, "fast")


@needs_native
def test_kernels_that_are_too_large_for_the_native_code():
    words = "it takes kernels up to 11, not 13"
    assert words in refusal(depthwise, "cpu", weight=tensor(6, 1, 13, 13))
    assert words in refusal(branch, "cpu", depthwise=tensor(8, 1, 13, 13))
    assert depthwise(image(*X), norm(6), weight=tensor(6, 1, 13, 13)).shape == X
