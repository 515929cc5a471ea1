"""weight_norm on a GPU: all weights in one launch per type. A program has BLOCK_R rows of one weight and passes over them
twice, first for their sums, then for the results, when they come from cache. `shared_weights` launches the kernels too, with
results in a type of their own, and with terms factor u v^T added to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _lists
from nvae_fast.kernels._tile import TYPES, pointer_in

BLOCK_R, BLOCK_K = 2, 1024

# A row of the table of items: addresses (0: none), sizes, strides of log_norm and its gradient, whether accesses may be wide,
# period and step of the columns (column j in memory is number j % PERIOD * STEP + j // PERIOD, which v counts by).
WEIGHT, MASK, GRAD, OUT, LOG_NORM, DLOG_NORM, FACTOR, U, V = (tl.constexpr(i) for i in range(9))
ROWS, COLUMNS, FIRST_JOB, LOG_STRIDE, DLOG_STRIDE, ALIGNED, PERIOD, STEP = (tl.constexpr(i) for i in range(9, 17))
FIELDS = tl.constexpr(17)


@triton.jit
def find_rows(jobs_table, items_table, BLOCK_R: tl.constexpr):
    """The item of this program, and its rows."""
    item = items_table + tl.load(jobs_table + tl.program_id(0)) * FIELDS
    return item, (tl.program_id(0) - tl.load(item + FIRST_JOB)) * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def columns_of(item, A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """Whose rows of types A and B may be read and written 16 bytes at a time if WIDE."""
    columns = tl.load(item + COLUMNS).to(tl.int32)
    if WIDE:
        columns = tl.multiple_of(columns, 128 // min(A.primitive_bitwidth, B.primitive_bitwidth))
    return columns


@triton.jit
def load_values(pointer, at, inside):
    """As float32, 0 outside and where there are none."""
    return tl.load(pointer + at, mask=inside & (pointer.to(tl.int64) != 0), other=0.0).to(tl.float32)


@triton.jit
def load_term(item, r, k, inside):
    """factor u v^T at these rows and columns: u is 1 where there is none, the product 0 where there is no v."""
    factor_ptr, u_ptr = pointer_in(item, FACTOR, tl.float32, False), pointer_in(item, U, tl.float32, False)
    v_ptr, period = pointer_in(item, V, tl.float32, False), tl.load(item + PERIOD).to(tl.int32)
    some, step = v_ptr.to(tl.int64) != 0, tl.load(item + STEP).to(tl.int32)
    left = tl.load(u_ptr + r, mask=(u_ptr.to(tl.int64) != 0) & (r < tl.load(item + ROWS)), other=1.0)
    right = tl.load(v_ptr + (k % period * step + k // period), mask=inside & some, other=0.0)
    return tl.load(factor_ptr, mask=some, other=0.0) * left * right


@triton.jit
def load_mask(pointer, at, inside):
    """1 where there is no mask."""
    return tl.load(pointer + at, mask=inside & (pointer.to(tl.int64) != 0), other=1.0)


@triton.jit
def load_norm(item, r, NORM: tl.constexpr):
    """exp(l) in float64."""
    pointers = pointer_in(item, LOG_NORM, NORM, False) + r * tl.load(item + LOG_STRIDE)
    log_norm = tl.load(pointers, mask=r < tl.load(item + ROWS), other=0.0).to(tl.float32)
    return tl.exp(log_norm.to(tl.float64))


@triton.jit
def write_weights(item, r, eps, STORED: tl.constexpr, NORM: tl.constexpr, RESULT: tl.constexpr, BLOCK_K: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    columns, inside_rows = columns_of(item, STORED, RESULT, WIDE), (r < tl.load(item + ROWS))[:, None]
    w_ptr, mask_ptr = pointer_in(item, WEIGHT, STORED, WIDE), pointer_in(item, MASK, tl.float32, WIDE)
    first = r[:, None] * columns
    squares = tl.zeros([r.shape[0], BLOCK_K], tl.float32)
    for k0 in range(0, columns, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        inside = inside_rows & (k < columns)
        x = load_values(w_ptr, first + k, inside) * load_mask(mask_ptr, first + k, inside)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares.to(tl.float64), 1))
    scale = (load_norm(item, r, NORM) / (norm + eps)).to(tl.float32)[:, None]
    out_ptr = pointer_in(item, OUT, RESULT, WIDE)
    for k0 in range(0, columns, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        inside = inside_rows & (k < columns)
        x = load_values(w_ptr, first + k, inside) * load_mask(mask_ptr, first + k, inside)
        tl.store(out_ptr + (first + k), (scale * x).to(RESULT), mask=inside)


@triton.jit
def load_gradient(item, r, k, first, inside, GIVEN: tl.constexpr, TERMS: tl.constexpr, WIDE: tl.constexpr):
    gradient = load_values(pointer_in(item, GRAD, GIVEN, WIDE), first + k, inside)
    if TERMS:
        gradient += load_term(item, r[:, None], k, inside)
    return gradient


@triton.jit
def write_gradients(item, r, eps, STORED: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr, TERMS: tl.constexpr,
                    BLOCK_K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """With the unit row h = x / n: dx = e / d ((g - h (g.h)) + h (g.h) eps / d). In a row with one element that counts the
    first bracket is 0 but for rounding, and the second keeps its digits."""
    columns, inside_rows = columns_of(item, STORED, GIVEN, WIDE), (r < tl.load(item + ROWS))[:, None]
    w_ptr, mask_ptr = pointer_in(item, WEIGHT, STORED, WIDE), pointer_in(item, MASK, tl.float32, WIDE)
    out_ptr = pointer_in(item, OUT, STORED, WIDE)
    first = r[:, None] * columns
    squares = tl.zeros([r.shape[0], BLOCK_K], tl.float32)
    products = tl.zeros([r.shape[0], BLOCK_K], tl.float32)
    for k0 in range(0, columns, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        inside = inside_rows & (k < columns)
        x = load_values(w_ptr, first + k, inside) * load_mask(mask_ptr, first + k, inside)
        squares += x * x
        products += x * load_gradient(item, r, k, first, inside, GIVEN, TERMS, WIDE)
    norm, product = tl.sqrt(tl.sum(squares.to(tl.float64), 1)), tl.sum(products.to(tl.float64), 1)
    scale = load_norm(item, r, NORM) / (norm + eps)
    at = r * tl.load(item + DLOG_STRIDE)
    tl.store(
        pointer_in(item, DLOG_NORM, NORM, False) + at, (scale * product).to(tl.float32).to(NORM), mask=r < tl.load(item + ROWS)
    )
    divisor = tl.where(norm == 0, 1.0, norm)
    along = tl.where(norm == 0, 0.0, product / divisor)
    kept = (along * eps / (norm + eps)).to(tl.float32)[:, None]
    scale, along, divisor = scale.to(tl.float32)[:, None], along.to(tl.float32)[:, None], divisor.to(tl.float32)[:, None]
    for k0 in range(0, columns, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        inside = inside_rows & (k < columns)
        mask = load_mask(mask_ptr, first + k, inside)
        unit = tl.div_rn(load_values(w_ptr, first + k, inside) * mask, tl.broadcast_to(divisor, mask.shape))
        gradient = load_gradient(item, r, k, first, inside, GIVEN, TERMS, WIDE)
        dx = scale * ((gradient - unit * along) + unit * kept)
        tl.store(out_ptr + (first + k), (dx * mask).to(STORED), mask=inside)


@triton.jit
def weight_norm_fwd_kernel(jobs_table, items_table, eps, STORED: tl.constexpr, NORM: tl.constexpr, RESULT: tl.constexpr,
                           BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    item, r = find_rows(jobs_table, items_table, BLOCK_R)
    if tl.load(item + ALIGNED) != 0:
        write_weights(item, r, eps, STORED, NORM, RESULT, BLOCK_K, True)
    else:
        write_weights(item, r, eps, STORED, NORM, RESULT, BLOCK_K, False)


@triton.jit
def weight_norm_bwd_kernel(jobs_table, items_table, eps, STORED: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr,
                           TERMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    item, r = find_rows(jobs_table, items_table, BLOCK_R)
    if tl.load(item + ALIGNED) != 0:
        write_gradients(item, r, eps, STORED, NORM, GIVEN, TERMS, BLOCK_K, True)
    else:
        write_gradients(item, r, eps, STORED, NORM, GIVEN, TERMS, BLOCK_K, False)


class Item(NamedTuple):
    """One weight: tensors whose rows are the same way in memory, and the results to be copied if they are not in place."""

    weight: Tensor
    mask: Tensor | None
    log_norm: Tensor | None
    grad: Tensor | None
    out: Tensor
    dlog_norm: Tensor | None
    result: Tensor
    term: Sequence[Tensor | None] = (None, None, None)  # factor, u, v

    def row(self, first_job: int) -> tuple[int, ...]:
        tensors = self.weight, self.mask, self.grad, self.out, self.log_norm, self.dlog_norm, *self.term
        strides = (0 if t is None else t.stride(0) for t in tensors[4:6])
        addresses = (0 if t is None else t.data_ptr() for t in tensors)
        return *addresses, *self.sizes, first_job, *strides, self.aligned, *columns(self.weight)

    @property
    def aligned(self) -> bool:
        """Whether accesses may be wide."""
        return _lists.aligned(self.sizes[1], self.weight, self.mask, self.grad, self.out)

    @property
    def given(self) -> Tensor:
        """A tensor of the type of the gradient that came."""
        return self.out if self.grad is None else self.grad

    @property
    def sizes(self) -> tuple[int, int]:
        rows = self.weight.shape[0]
        return rows, self.weight.numel() // max(rows, 1)

    @property
    def jobs(self) -> int:
        return triton.cdiv(self.sizes[0], BLOCK_R)


def columns(rows: Tensor) -> tuple[int, int]:
    """Period and step of the columns of dense rows."""
    count = rows.numel() // max(rows.shape[0], 1)
    return (max(count, 1), 1) if rows.is_contiguous() else (rows.shape[1], count // rows.shape[1])


def weight_norm_fwd(
    weights: Sequence[Tensor], log_norms: Sequence[Tensor], masks: Sequence[Tensor | None], eps: float
) -> list[Tensor]:
    items = [_item(i, *tensors, None) for i, tensors in enumerate(zip(weights, masks, log_norms, strict=True))]
    launch(forward(items, eps))
    return [item.result for item in items]


def weight_norm_bwd(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    eps: float,
) -> list[Tensor]:
    given = enumerate(zip(weights, masks, log_norms, grads, strict=True))
    items = [_item(i, *tensors) for i, tensors in given if tensors[-1] is not None]
    launch(backward(items, eps))
    return [item.result for item in items] + [item.dlog_norm for item in items]


def _item(i: int, weight: Tensor, mask: Tensor | None, log_norm: Tensor, grad: Tensor | None) -> Item:
    wanted = {
        "log_norms": (log_norm, (weight.shape[0],) + (1,) * (weight.dim() - 1), log_norm.dtype),
        "masks": (mask, weight.shape, torch.float32),
        "grads": (grad, weight.shape, weight.dtype),
    }
    for name, (t, shape, dtype) in wanted.items():
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != weight.device):
            expected = f"{tuple(shape)} and {dtype} on {weight.device}"
            raise RuntimeError(f"{name}[{i}] has shape {tuple(t.shape)} and type {t.dtype} on {t.device}; expected {expected}")
    rows, result = _lists.dense_rows(weight), torch.empty_like(weight)
    mask, grad = (None if t is None else _lists.in_order_of(rows, t) for t in (mask, grad))
    out = result if _lists.in_order_of(rows, result) is result else torch.empty_like(rows)
    return Item(rows, mask, log_norm, grad, out, None if grad is None else torch.empty_like(log_norm), result)


class Work(NamedTuple):
    """A launch: the kernel on items of one combination of types."""

    kernel: Any
    items: Sequence[Item]
    numbers: Sequence[float]
    constants: dict[str, Any]


def forward(items: Sequence[Item], eps: float) -> list[Work]:
    """One launch for all items of the same types; a model has one or two."""
    works = []
    for group in _lists.grouped(items, lambda item: (item.weight.dtype, item.log_norm.dtype, item.out.dtype)):
        types = dict(zip(("STORED", "NORM", "RESULT"), _types(group[0].weight, group[0].log_norm, group[0].out), strict=True))
        works.append(Work(weight_norm_fwd_kernel, group, [eps], types | dict(BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K)))
    return works


def backward(items: Sequence[Item], eps: float) -> list[Work]:
    works = []
    for group in _lists.grouped(items, lambda item: (item.weight.dtype, item.log_norm.dtype, item.given.dtype)):
        types = dict(zip(("STORED", "NORM", "GIVEN"), _types(group[0].weight, group[0].log_norm, group[0].given), strict=True))
        terms = any(item.term[2] is not None for item in group)
        works.append(Work(weight_norm_bwd_kernel, group, [eps], types | dict(TERMS=terms, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K)))
    return works


def _types(*tensors: Tensor) -> list[tl.dtype]:
    return [TYPES[t.dtype] for t in tensors]


def launch(works: Sequence[Work]) -> None:
    """All launches of a call, whose addresses go up in one table."""
    rows: list[tuple[int, ...]] = []
    places = []
    for work in works:
        rows += [(0,) * FIELDS.value] * (len(rows) % 2)  # so that each part begins on 16 bytes, which Triton's code depends on
        counts = tuple(item.jobs for item in work.items)
        places.append((counts, len(rows) * FIELDS.value))
        rows += [item.row(first) for item, first in zip(work.items, _lists.starts(counts), strict=True)]
    if any(sum(counts) for counts, _ in places):
        device = works[0].items[0].weight.device
        table = _lists.upload(_lists.numbers(rows), device)
        for work, (counts, begin) in zip(works, places, strict=True):
            if any(counts):
                jobs = _lists.standing(_lists.jobs(counts), device)
                work.kernel[(sum(counts),)](jobs, table[begin:], *work.numbers, **work.constants)
    for work in works:
        for item in work.items:
            if item.out is not item.result:
                item.result.copy_(item.out)
