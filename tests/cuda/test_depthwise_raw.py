"""The raw ops of impl="cuda": statistics, the form c0 dy + c1 y + c2, every kernel on the same input, order, alignment."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import VARIANTS
from followings import WAYS, check_followed
from norms import check_stats, image, needs_native, tensor

pytestmark = needs_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SWISH, COUNT = 1, 77.0
BACKWARD = [
    (2, 40, 9, 17, 5), (1, 8, 37, 18, 5), (3, 24, 5, 16, 5), (1, 72, 16, 33, 5), (3, 72, 8, 7, 5), (2, 24, 10, 6, 3),
    (2, 30, 5, 6, 3), (1, 18, 6, 5, 5, 2), (1, 16, 4, 5, 5, 1, 1, 2)
]  # fmt: skip


def table(c: int) -> torch.Tensor:
    """bn [5, C]"""
    return torch.ops.nvae_fast.bn_act_coefficients(
        tensor(2, c, scale=0.2, shift=1.5).abs(), tensor(c, shift=1.0), tensor(c), 1e-5
    )


def arguments(n, c, h, w, k, stride=1, dilation=1, up=1, dtype=torch.float32, mean=1.5):
    """(dy, y, c, x, bn, act, weight, stride, dilation, upsample): of the backward, and from x on of the forward."""
    out = [(side * up - 1) // stride + 1 for side in (h, w)]
    x, weight = image(n, c, h, w, mean=mean).to(dtype), tensor(c, 1, k, k, scale=1 / k).to(dtype)
    dy, y = (tensor(n, c, *out, seed=seed).to(dtype) for seed in (1, 2))
    return dy, y, tensor(3, c), x, table(c), SWISH, weight, stride, dilation, up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize(
    "shape",
    [(3, 40, 17, 20, 5), (9, 24, 8, 8, 5), (2, 16, 20, 3, 3), (2, 30, 5, 6, 5), (2, 9, 6, 5, 3, 2), (3, 8, 1, 1, 5)],
    ids=str,
)
def test_statistics_of_the_output(library, shape, mean, dtype):
    x = arguments(*shape, dtype=dtype, mean=mean)[3:]
    y, stats = library.forward(*x, True)
    check_stats(stats, y)
    other, none = library.forward(*x, False)
    assert torch.equal(y, other) and none.shape == (0, shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_gradients_behind_a_normalisation(library, shape, dtype):
    """Against the C++ of the CPU on the same values in float32; the table of gradients against the sums of du as stored."""
    given = arguments(*shape, dtype=dtype)
    found = library.backward(*given, COUNT)
    truth = torch.ops.nvae_fast.depthwise_conv_bwd(*(t.float() if torch.is_tensor(t) else t for t in given))
    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)  # both sides round then
    for got, exact in zip(found[:2], truth[:2], strict=True):
        assert got.dtype == dtype and (got.float() - exact).abs().max() <= 2 * eps * exact.abs().max()
    du, x, mean = found[0].double(), given[3].double(), given[4][0].double().view(1, -1, 1, 1)
    sums = torch.stack((du.sum((0, 2, 3)), (du * (x - mean)).sum((0, 2, 3))))
    largest = (du.abs() * (x - mean).abs().clamp_min(1)).sum((0, 2, 3)).max()
    table = found[2]
    assert (table[:2] - sums).abs().max() <= 4 * torch.finfo(torch.float32).eps * largest
    for count, rows in (
        (COUNT, table),
        (0.0, library.backward(*given)[2]),
        (float("inf"), library.backward(*given, math.inf)[2]),
    ):
        assert torch.equal(rows[:2], table[:2])
        torch.testing.assert_close(rows, torch.ops.nvae_fast.bn_act_gradients(table[:2], given[4], count), rtol=1e-6, atol=1e-7)
    assert library.backward(*given[:4], None, *given[5:])[2].shape == (0, shape[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(3, 40, 17, 20, 5), (9, 24, 8, 8, 5), (2, 30, 5, 6, 5), (0, 8, 4, 4, 5)], ids=str)
def test_the_normalisation_that_follows(library, monkeypatch, shape, way):
    monkeypatch.setattr(torch.ops.nvae_fast, "depthwise_conv_cuda_fwd", library.forward)
    for dtype in (torch.float32, torch.bfloat16):
        args = (*arguments(*shape, dtype=dtype)[3:], True)
        check_followed("depthwise_conv_cuda_fwd", args, 1, **WAYS[way])


def test_fixed_statistics_keep_nan_in_its_pixel(library):
    given = arguments(2, 16, 4, 5, 3)
    given[0][1, 3, 2, 2] = float("nan")
    table = library.backward(*given)[2]
    assert table[:3].isnan().sum(1).tolist() == [1, 1, 1] and not table[4:6].any() and table[6].isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("variant", ["any", "core", "tensor"])
def test_nan_and_infinity_stay_in_their_channels(library, variant, dtype):
    """Of the gradients too, whose multiplications by tensor cores take 8 channels at a time."""
    given = arguments(2, 24, 17, 20, 5, dtype=dtype)
    usual = library.backward(*given, COUNT)
    given[0][1, 3, 15, 1], given[3][0, 5, 2, 2] = float("nan"), float("inf")  # of dy, of x
    found = library.backward(*given, COUNT, VARIANTS[variant])
    lost = torch.zeros(2, 24, 17, 20, dtype=torch.bool)
    lost[1, 3, 13:, :4] = lost[0, 5, 2, 2] = True  # act'(inf) is inf 0
    assert torch.equal(found[0].isnan(), lost)
    for got, expected in zip(found, usual, strict=True):
        there = got.isfinite()
        if got is not found[0]:
            assert set((~there).nonzero()[:, got.shape.index(24)].tolist()) == {3, 5}  # of dweight, of the table
        assert (got - expected)[there].abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("variant", ["any", "core", "tensor"])
def test_one_launch_each_way(library, variant):
    """As `nvae-fast estimate --launches` counts them."""
    given = arguments(9, 40, 17, 20, 5, dtype=torch.float16)
    before = library.c.launches()
    library.forward(*given[3:], True, variant=VARIANTS[variant])
    assert library.c.launches() - before == 1
    library.backward(*given, COUNT, VARIANTS[variant])
    assert library.c.launches() - before == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 72, 17, 10, 5), (1, 40, 6, 7, 5), (2, 40, 9, 5, 3)], ids=str)
def test_every_kernel_agrees(library, shape, dtype):
    given = arguments(*shape, dtype=dtype)
    for run in (
        lambda v: library.forward(*given[3:], True, variant=v),
        lambda v: library.backward(*given, COUNT, v),
    ):
        found = {}
        for name in ("any", "core", "tensor"):
            if name == "tensor" and (dtype == torch.float32 or shape[-1] == 3 or max(shape[2:4]) <= 8):
                with pytest.raises(RuntimeError):
                    run(VARIANTS[name])
                continue
            found[name] = run(VARIANTS[name])
            assert library.ran[-1] == name
        for other in list(found.values())[1:]:
            for a, b in zip(found["any"], other, strict=True):
                assert (a.float() - b.float()).abs().max() <= 4 * torch.finfo(dtype).eps * b.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 136, 17, 20, 5), (40, 8, 7, 8, 5), (2, 40, 9, 17, 3), (2, 30, 5, 9, 5), (1, 18, 6, 5, 5, 2)], ids=str
)
def test_the_same_bits_whatever_runs_first(library, shape, dtype):
    """Threads, warps and blocks from last to first: a barrier that is missing or a sum without an order would show."""
    given = arguments(*shape, dtype=dtype)
    runs = []
    for backwards in (False, True, False):
        library.c.set_reversed(backwards)
        runs.append([*library.forward(*given[3:], True), *library.backward(*given, COUNT)])
    library.c.set_reversed(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 10, 5), (2, 16, 4, 5, 3)], ids=str)
def test_tensors_that_begin_anywhere(library, shape, dtype):
    """A storage offset of one value: 16 bytes at a time would be misaligned."""
    given = list(arguments(*shape, dtype=dtype))

    def moved(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return torch.as_strided(memory, t.shape, t.stride()).copy_(t)

    for i in (0, 1, 3):
        odd = [moved(t) if j == i else t for j, t in enumerate(given)]
        for a, b in zip(library.backward(*odd), library.backward(*given, variant=VARIANTS["any"]), strict=True):
            assert (a.float() - b.float()).abs().max() <= torch.finfo(dtype).eps * b.float().abs().max()
        assert library.ran[-2:] == ["any", "any"]
    odd = [moved(t) if t is given[3] else t for t in given[3:]]
    assert torch.equal(library.forward(*odd, False)[0], library.forward(*given[3:], False, variant=VARIANTS["any"])[0])


def test_what_cannot_run_is_said(library):
    given = arguments(1, 8, 5, 5, 3)
    for change, words in (
        (dict(weight=torch.zeros(8, 1, 29, 29)), "an odd kernel of at most 27"),
        (dict(stride=3), "stride 1 or 2"),
        (dict(stride=2, upsample=2), "stride 1 to upsample by 2"),
        (dict(variant=4), "a variant of 0"),
    ):
        c = dict(x=given[3], bn=None, act=0, weight=given[6], stride=1, dilation=1, upsample=1, stats=False, variant=0) | change
        with pytest.raises(AssertionError, match=words):
            library.forward(**c)
    assert library.forward(given[3], None, 0, tensor(8, 1, 27, 27), 1, 1, 1, True)[0].isfinite().all()
