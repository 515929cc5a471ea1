"""pointwise_conv's Triton kernels without a normalisation: bias, activation, a second input, sums before and behind."""

from __future__ import annotations

import pytest
import torch
from norms import CL, check_stats, copied, image, leaf, needs_native, norm, outcome, same, tensor
from pointwise_parts import EMPTY, PARTS, everything, nothing, some, tensors

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF = torch.float32, torch.float16
# N, C, C beside, C_out, H, W: tails of rows and of the columns of both inputs, either of which may be wider than a block
SHAPES = [(1, 1, 1, 7, 5, 1), (2, 40, 5, 17, 5, 8), (1, 5, 70, 3, 9, 5), (1, 130, 20, 65, 3, 3)]
CASES = [(shape, act, FLOAT) for shape, act in zip(SHAPES, ("identity", "elu", "swish", "elu"), strict=True)]
CASES += [(shape, "elu", HALF) for shape in SHAPES[1:]]


@pytest.mark.parametrize(("shape", "act", "dtype"), CASES, ids=str)
def test_values_and_gradients(check, shape, act, dtype):
    check(everything(act, passed=act == "elu"), tensors(*shape), [], dtype, 5)


@pytest.mark.parametrize("given", PARTS, ids=str)
def test_each_part_alone(check, given):
    call, args = some(given)
    check(call, args, [], FLOAT, 2)


def test_behind_a_normalisation(check):
    x, weight, bias, _, addend = tensors(2, 9, 0, 7, 3, 4)

    def call(t, n, impl):
        y, x = F.pointwise_conv(*t[:3], norm=n[0], act="swish", addend=t[3], return_x=1, impl=impl)
        return torch.cat((y, x), 1)

    check(call, [x, weight, bias, addend], [norm(9)], FLOAT, 4)


def test_statistics_are_of_what_is_stored():
    x, weight, bias, beside, addend = (t.half() for t in tensors(*SHAPES[1]))
    options = dict(beside=beside, addend=addend, act="elu", impl="triton")
    y, stats = F.pointwise_conv(x, weight, bias, return_stats=True, **options)
    assert torch.equal(y, F.pointwise_conv(x, weight, bias, **options)) and y.is_contiguous(memory_format=CL)
    check_stats(stats, y)


def test_any_strides_64_bit_offsets_and_reruns_give_the_same_bits(monkeypatch):
    args, call = tensors(2, 33, 7, 17, 10, 4), everything("elu", passed=True)
    dense = outcome(call, args, [], "triton")
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if t.dim() == 4 else t  # noqa: E731
    same(dense, outcome(call, args, [], "triton", sliced, torch.Tensor.contiguous))
    same(dense, outcome(call, args, [], "triton"))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    same(dense, outcome(call, args, [], "triton"))


@needs_native
def test_both_schemas_as_in_the_native_code(monkeypatch):
    x, weight, bias, beside, addend = tensors(2, 33, 7, 17, 6, 5)
    dy, also, found = tensor(2, 17, 6, 5, seed=3), image(2, 33, 6, 5, seed=4), []
    for _ in range(2):
        raw = torch.ops.nvae_fast
        forward = raw.pointwise_conv_fwd(x, None, 2, weight, True, False, bias, addend, beside)
        found.append((*forward, *raw.pointwise_conv_bwd(dy, None, None, x, None, 2, weight, 0.0, True, also, beside)))
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5)


def test_nan_stays_in_its_pixel():
    for i, name in ((0, "x"), (3, "beside"), (4, "addend")):
        args = tensors(2, 9, 5, 7, 3, 4)
        args[i][1, 2, 2, 1] = torch.nan
        y = everything("elu")(args, [], "triton")
        assert y.isnan().sum() == (1 if name == "addend" else 7) and y[1, 2, 2, 1].isnan(), name


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_sum_leaves_what_is_added(shape):
    nothing(shape, "triton")


def test_a_pass_takes_one_launch_and_so_does_its_backward(launches):
    """Of whatever is added, before or behind; x is read by others as well."""
    args = [leaf(t) for t in tensors(2, 9, 5, 7, 3, 4)]
    torch.autograd.grad(everything("elu")(args, [], "triton").sum(), args)
    with launches() as names:
        found = F.pointwise_conv(*args[:3], beside=args[3], addend=args[4], act="elu", return_x=1, impl="triton")
    assert names == ["pointwise_conv_fwd_kernel"]
    grads = [torch.ones_like(t) for t in found]
    with launches() as names:
        torch.autograd.grad(found, args, grads)
    assert names == ["pointwise_conv_bwd_kernel"]


def test_arguments_that_do_not_fit_are_refused():
    x, weight, bias, beside, addend = tensors(2, 9, 5, 7, 3, 4)
    fwd, bwd = torch.ops.nvae_fast.pointwise_conv_fwd, torch.ops.nvae_fast.pointwise_conv_bwd
    bn = tensor(5, 9)
    with pytest.raises(RuntimeError, match="bias has shape"):
        fwd(x, None, 0, weight, False, False, bias[:3], addend, beside)
    with pytest.raises(RuntimeError, match="addend has shape"):
        fwd(x, None, 0, weight, False, False, bias, addend[:1], beside)
    with pytest.raises(RuntimeError, match="beside has shape"):
        fwd(x, None, 0, weight, False, False, bias, addend, beside[:1])
    with pytest.raises(RuntimeError, match="not both"):
        fwd(x, bn, 0, weight, False, False, bias, addend, beside)
    with pytest.raises(RuntimeError, match="no gradient of x"):
        bwd(addend, None, None, x, bn, 0, weight[:, :9], 0.0, True, x)
    for options, said in (
        (dict(beside=beside, norm=copied(norm(9))), "beside with norm"),
        (dict(beside=beside[:1]), "beside has shape .* expected .2, C2, 3, 4."),
        (dict(addend=addend[:, :3], beside=beside), "addend has shape .* expected .2, 7, 3, 4."),
        (dict(bias=bias[:3], beside=beside), "bias has shape"),
        (dict(beside=beside.int()), "beside is torch.int32"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            F.pointwise_conv(x, weight, **options)
