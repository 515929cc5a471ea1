"""Raw ops that are told of the normalisation that follows: what the two ops, one after the other, give."""

from __future__ import annotations

import torch
from norms import (
    bn_act,
    branch,
    branch_norms,
    branch_tensors,
    dense,
    depthwise,
    image,
    norm,
    outcome,
    pointwise,
    se_tensors,
    tensor,
    with_all,
)
from pointwise_parts import tensors as pointwise_tensors
from torch import Tensor

from nvae_fast import functional as F

RAW = torch.ops.nvae_fast
WAYS = {  # which parts the normalisation has, of which types and strides
    "all": {},
    "plain": dict(weight=None, bias=None, offset=None, mean=None, var=None, batches=None),
    "no counter": dict(batches=None, offset=None),
    "no statistics": dict(mean=None, var=None),
    "other buffers": dict(
        mean=torch.zeros(400, dtype=torch.float64)[::2], var=torch.ones(200, dtype=torch.float16), copies=4.0
    ),
}


def calls(channels: int, h: int, w: int, batch: int = 2) -> dict[str, tuple[str, tuple, int]]:
    """By name: a raw op, its arguments before those of the normalisation, and which of its outputs are the statistics."""
    x = image(batch, channels, h, w)
    skip, branch, *gate = se_tensors(batch, channels, h, w)
    return {
        "bn_act": ("bn_act_stats", (x,), 0),
        "pointwise": (
            "pointwise_conv_fwd",
            (image(batch, 9, h, w), None, 0, tensor(channels, 9, 1, 1), True, True, *[None] * 3),
            1,
        ),
        "depthwise": ("depthwise_conv_fwd", (x, None, 0, tensor(channels, 1, 3, 3), 1, 1, 1, True), 1),
        "se": ("se_residual_fwd", (skip, branch, None, *gate, None, 0.1, True), 2),
    }


def check_followed(name: str, args: tuple, i: int, *, weight=True, bias=True, offset=True, mean=True, var=True, batches=True,
                   copies: float = 1.0) -> Tensor:  # fmt: skip
    """The table [5, C], to the bit what the op for coefficients makes of the statistics; so are the buffers moved."""
    op = getattr(RAW, name)
    apart = op(*args)
    apart = apart if isinstance(apart, tuple) else (apart,)
    stats, channels = apart[i], apart[i].shape[1]
    affine = [None if t is None else tensor(channels, seed=s) for s, t in enumerate((weight, bias, offset))]
    buffers = [None if t is None else torch.ones(channels) if t is True else t[:channels] for t in (mean, var)]
    buffers.append(None if batches is None else torch.tensor(3))
    first, second = ([None if t is None else t.new_tensor(t.tolist()) for t in buffers] for _ in range(2))
    if buffers[0] is not None and buffers[0].stride(0) > 1:
        second[0] = torch.empty_strided(buffers[0].shape, (2,), dtype=buffers[0].dtype).copy_(first[0])
    image = args[0] if name == "bn_act_stats" else apart[0]
    count = image.numel() // channels * copies
    bn = RAW.bn_act_coefficients(stats, *affine[:2], 0.25, *first, 0.1, count, affine[2])
    found = op(*args, [0.25, 0.1, copies], *affine, *second)
    found = found if isinstance(found, tuple) else (found,)
    assert found[i].shape == (5, channels) and bn.isfinite().all()
    for a, b in zip((*apart[:i], bn, *apart[i + 1 :], *first), (*found, *second), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    if mean is True and count > 0:
        moved = 0.9 + 0.1 * (stats[0] + (0 if affine[2] is None else affine[2]))
        torch.testing.assert_close(second[0], moved)
        torch.testing.assert_close(second[1], 0.9 + 0.1 * stats[1] * count / max(count - 1, 1))
    assert batches is None or second[2] == 4
    return found[i]


PRODUCERS = {  # of an image of 6 channels: a call of its tensors, and those
    "se": (lambda t, **options: F.se_residual(*t, **options), se_tensors(2, 6, 5, 4)),
    "pointwise": (lambda t, impl, **options: with_all(t, [], impl, **options), pointwise_tensors(2, 9, 5, 6, 5, 4)),
}


def check_next_norm(impl: str, consumer_impl: str, op: str, producer: str = "se", **options) -> None:
    """An op that is told of the next norm and the op behind it: the numbers, gradients and buffers of the two without it."""
    make, tensors = PRODUCERS[producer]
    behind = {
        "bn_act": (bn_act, []),
        "dense": (dense, [tensor(4, 6, 3, 3)]),
        "pointwise": (pointwise, [tensor(4, 6, 1, 1)]),
        "depthwise": (depthwise, [tensor(6, 1, 3, 3)]),
        "branch": (branch, branch_tensors(2, 6, 8, 5, 5, 4)[1:]),
    }[op]
    norms = branch_norms(6, 8, 5) if op == "branch" else [norm(6)]
    norms[0] = norms[0]._replace(offset=tensor(6), **options)

    def call(t, n, told):
        handed = n[0] if told else None
        y, stats = make(t[: len(tensors)], return_stats=True, next_norm=handed, impl=impl)
        assert stats is None or len(stats) == (5 if told and not options else 2)
        return behind[0]([y, *t[len(tensors) :]], [n[0]._replace(stats=stats), *n[1:]], consumer_impl)

    apart, told = (outcome(call, [*tensors, *behind[1]], norms, told) for told in (False, True))
    assert told["count0"] == 3 + norms[0].training
    exact = consumer_impl == impl
    for name, t in apart.items():
        torch.testing.assert_close(told[name], t, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)
