"""se_residual_dy_, which makes dy and takes the sums of se_residual's backward: the bits of the two passes it stands for."""

from __future__ import annotations

import pytest
import torch
from norms import image, se_tensors, tensor

from nvae_fast.kernels import _triton

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF = torch.float32, torch.float16
RAW = torch.ops.nvae_fast
SWISH = 1


def raw_tensors(shape, dtype, before, others):
    """(du, y, bn of y, c, others), (x, what stands before, the rest) as both ways take them."""
    batch, channels, h, w, hidden = shape
    y, x, w1, _, w2, _ = se_tensors(*shape)
    table = {"norm": tensor(5, channels, shift=0.5), "bias": tensor(channels), "nothing": None}[before]
    state = tensor(batch, 3 * channels + hidden, seed=4).abs()
    images = [image(batch, channels, h, w, seed=i).to(dtype) for i in range(2, 3 + others)]
    return (images[0], y.to(dtype), tensor(5, channels), tensor(3, channels), images[1:]), (x.to(dtype), table, w1, w2, state)


# N, C, H, W, hidden: tails of pixels, channels and hidden units; blocks of channels; tasks of several tiles, one not full
SHAPES = {"tails": (2, 33, 5, 1, 5), "one value": (1, 1, 1, 1, 1), "blocks": (1, 66, 5, 4, 2), "tasks": (2, 7, 20, 61, 2)}
WAYS = [(None, "norm", 1, FLOAT), (None, "bias", 0, HALF), (SWISH, "norm", 2, HALF), (SWISH, "nothing", 1, FLOAT)]


def both_ways(tensors, before, act):
    """[dy, dx, gradients] of the joined and of the two separate passes."""
    (du, y, bn, c, also), (x, table, *rest) = tensors
    copies = [du.clone(memory_format=torch.preserve_format) for _ in range(2)]
    dy, given, normed = (torch.full_like(du, torch.nan), copies[0], bn) if act else (copies[0], None, None)
    shares = RAW.se_residual_dy_(dy, given, y, normed, act or 0, c, *also, *[None] * (2 - len(also)), x, table, *rest, 0.3)
    yield [dy, *RAW.se_residual_dx(dy, table, *rest, shares, 0.3)]
    if act:
        dy = RAW.bn_act_bwd(du, y, bn, act, c, *also)
    else:
        RAW.bn_act_affine_(dy := copies[1], y, c, *also)
    yield [dy, *RAW.se_residual_bwd(dy, x, table, *rest, 0.3)]


@pytest.mark.parametrize(("act", "before", "others", "dtype"), WAYS, ids=str)
@pytest.mark.parametrize("size", SHAPES)
def test_both_ways_give_the_same_bits(monkeypatch, size, act, before, others, dtype):
    tasks = _triton.tasks
    monkeypatch.setattr(_triton, "tasks", lambda rows, least, wanted: tasks(rows, least, 2))
    found, separate = both_ways(raw_tensors(SHAPES[size], dtype, before, others), before, act)
    assert len(found) == len(separate) == 6 + (before != "nothing")
    for a, b in zip(found, separate, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("act", [None, SWISH])
def test_any_strides_64_bit_offsets_and_nan(monkeypatch, act):
    """A NaN of y stays in its image."""
    tensors = raw_tensors((2, 9, 5, 3, 4), FLOAT, "norm", 2)
    tensors[0][1][1, 4, 2, 1] = torch.nan
    dense, _ = both_ways(tensors, "norm", act)
    assert dense[0].isnan().sum() == 1 and not dense[1][0].isnan().any() and dense[1][1].isnan().all()
    planar = [[t.contiguous() for t in group] if isinstance(group, list) else group.contiguous() for group in tensors[0]]
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    found, _ = both_ways((planar, [tensors[1][0].contiguous(), *tensors[1][1:]]), "norm", act)
    for a, b in zip(found, dense, strict=True):
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


def test_an_empty_batch():
    found, _ = both_ways(raw_tensors((0, 9, 5, 3, 4), FLOAT, "norm", 1), "norm", None)
    assert found[0].shape == found[1].shape == (0, 9, 5, 3) and not any(t.any() for t in found[2:])


def test_tensors_that_do_not_fit_are_refused():
    (du, y, bn, c, also), (x, *rest) = raw_tensors((2, 9, 5, 3, 4), FLOAT, "norm", 1)
    for wrong, said in (
        (dict(du=du), "both du and norm"),
        (dict(y=y[:1]), "y has shape"),
        (dict(c=c[:2]), "c has shape"),
        (dict(also=y.half()), "also has shape"),
        (dict(w1=rest[2]), "w1 has shape"),
    ):
        given = dict(dy=du, du=None, y=y, norm=None, act=0, c=c, also=also[0], also2=None, x=x)
        given |= dict(zip(("bn", "w1", "w2", "state"), rest, strict=True))
        with pytest.raises(RuntimeError, match=said):
            RAW.se_residual_dy_(*(given | wrong).values(), 0.3)
    with pytest.raises(RuntimeError, match="shares has shape"):
        RAW.se_residual_dx(du, *rest, torch.zeros(2, 9), 0.3)
