"""Calls of pointwise_conv with all that may stand around a 1x1 convolution but a normalisation."""

from __future__ import annotations

import torch
from norms import image, leaf, tensor

from nvae_fast import functional as F

EMPTY = [(0, 9, 5, 7, 3, 4), (2, 0, 5, 7, 3, 4), (2, 9, 0, 7, 3, 4), (2, 9, 5, 0, 3, 4)]  # N, C, C beside, C_out, H, W
PARTS = [(), ("bias",), ("beside",), ("addend",), ("bias", "addend")]


def tensors(n, c, more, out, h, w):
    """x, weight, bias, beside, addend"""
    fan = c + more
    return [image(n, c, h, w), tensor(out, fan, 1, 1, scale=fan**-0.5), tensor(out), image(n, more, h, w, seed=1),
            tensor(n, out, h, w, seed=2)]  # fmt: skip


def everything(act="identity", *, passed=False):
    """A call of x, weight, bias, beside, addend; `passed`: its result beside x, which is read twice."""

    def call(t, n, impl):
        x, weight, bias, beside, addend = t
        found = F.pointwise_conv(x, weight, bias, beside=beside, addend=addend, act=act, return_x=int(passed), impl=impl)
        return torch.cat((found[0], 3.0 * found[1]), 1) if passed else found

    return call


def some(given, channels=9):
    """(a call with these parts alone, its tensors)"""
    x, weight, *rest = tensors(2, channels, 5, 7, 3, 4)
    parts = dict(zip(("bias", "beside", "addend"), rest, strict=True))
    weight = weight if "beside" in given else weight[:, :channels].contiguous()

    def call(t, n, impl):
        return F.pointwise_conv(t[0], t[1], **dict(zip(given, t[2:], strict=True)), act="elu", impl=impl)

    return call, [x, weight, *(parts[name] for name in given)]


def nothing(shape, impl):
    """A call of which one size is 0 is what torch makes of both inputs as one, gradients included."""
    leaves = [leaf(t) for t in tensors(*shape)]
    x, weight, bias, beside, addend = leaves
    a = torch.nn.functional.elu(torch.cat((x, beside), 1)).permute(0, 2, 3, 1)
    y = addend + torch.nn.functional.linear(a, weight.flatten(1), bias).permute(0, 3, 1, 2)
    found = everything("elu")(leaves, [], impl)
    dy = tensor(*y.shape, seed=3)
    pairs = [(found, y), *zip(*(torch.autograd.grad(t, leaves, dy) for t in (found, y)), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
