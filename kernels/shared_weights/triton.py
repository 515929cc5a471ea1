"""shared_weights on a GPU: the kernels of weight_norm for weights that are normalised, and two for those that are only cast,
each one launch for all weights of one type. Everything is written into one buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _lists
from nvae_fast.kernels._tile import TYPES, pointer_in
from nvae_fast.kernels.shared_weights.ops import parts, places
from nvae_fast.kernels.weight_norm.triton import (
    ALIGNED,
    COLUMNS,
    FIELDS,
    FIRST_JOB,
    GRAD,
    OUT,
    ROWS,
    WEIGHT,
    Item,
    Work,
    backward,
    forward,
    launch,
    load_term,
    load_values,
)

BLOCK = 2048


@triton.jit
def find_values(jobs_table, items_table, BLOCK: tl.constexpr):
    """The item of this program, and its first value."""
    item = items_table + tl.load(jobs_table + tl.program_id(0)) * FIELDS
    return item, (tl.program_id(0) - tl.load(item + FIRST_JOB)) * BLOCK


@triton.jit
def inside_of(item, i, A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """Which values there are; 16 bytes at a time of types A and B if WIDE."""
    count = tl.load(item + ROWS) * tl.load(item + COLUMNS)
    if WIDE:
        count = tl.multiple_of(count, 128 // min(A.primitive_bitwidth, B.primitive_bitwidth))
    return i < count


@triton.jit
def write_values(item, first, STORED: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    inside = inside_of(item, i, STORED, RESULT, WIDE)
    values = load_values(pointer_in(item, WEIGHT, STORED, WIDE), i, inside)
    tl.store(pointer_in(item, OUT, RESULT, WIDE) + i, values.to(RESULT), mask=inside)


@triton.jit
def write_plain_gradients(item, first, GIVEN: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    inside = inside_of(item, i, GIVEN, tl.float32, WIDE)
    total = load_values(pointer_in(item, GRAD, GIVEN, WIDE), i, inside)
    if TERMS:
        columns = tl.load(item + COLUMNS).to(tl.int32)
        k = (first % columns).to(tl.int32) + tl.arange(0, BLOCK)  # one division in 64 bits a program
        total += load_term(item, first // columns + k // columns, k % columns, inside)
    tl.store(pointer_in(item, OUT, tl.float32, WIDE) + i, total, mask=inside)


@triton.jit
def shared_weights_fwd_kernel(jobs_table, items_table, STORED: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    item, first = find_values(jobs_table, items_table, BLOCK)
    if tl.load(item + ALIGNED) != 0:
        write_values(item, first, STORED, RESULT, BLOCK, True)
    else:
        write_values(item, first, STORED, RESULT, BLOCK, False)


@triton.jit
def shared_weights_bwd_kernel(jobs_table, items_table, GIVEN: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient in float32, with its term."""
    item, first = find_values(jobs_table, items_table, BLOCK)
    if tl.load(item + ALIGNED) != 0:
        write_plain_gradients(item, first, GIVEN, TERMS, BLOCK, True)
    else:
        write_plain_gradients(item, first, GIVEN, TERMS, BLOCK, False)


class PlainItem(Item):
    """One weight that is not normalised, whose values are all the same to the kernels but for its term."""

    @property
    def aligned(self) -> bool:
        return _lists.aligned(self.weight.numel(), self.weight, self.grad, self.out)

    @property
    def jobs(self) -> int:
        return triton.cdiv(self.weight.numel(), BLOCK)


def shared_weights_fwd(
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    buffer = torch.empty(places(w.numel() for w in weights)[1], dtype=dtype, device=weights[0].device)
    given = zip(weights, log_norms, masks, parts(buffer, weights), strict=True)
    items = [_item(w, norm, m, None, value, None) for w, norm, m, value in given]
    works = forward([item for item in items if item.log_norm is not None], eps)
    for group in _lists.grouped([item for item in items if item.log_norm is None], lambda item: item.weight.dtype):
        types = dict(STORED=TYPES[group[0].weight.dtype], RESULT=TYPES[dtype], BLOCK=BLOCK)
        works.append(Work(shared_weights_fwd_kernel, group, [], types))
    launch(works)
    return buffer


def shared_weights_bwd(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    u: Sequence[Tensor | None],
    v: Sequence[Tensor | None],
    eps: float,
) -> Tensor:
    _check(grads, weights, factors, u, v)
    results = [*weights, *(norm for norm in log_norms if norm is not None)]
    buffer = torch.empty(places(t.numel() for t in results)[1], dtype=torch.float32, device=weights[0].device)
    found = parts(buffer, results)
    dnorms = iter(found[len(weights) :])
    items = [
        _item(w, norm, m, g, dw, None if norm is None else next(dnorms), *term)
        for w, norm, m, g, dw, *term in zip(weights, log_norms, masks, grads, found, factors, u, v, strict=False)
    ]
    works = backward([item for item in items if item.log_norm is not None], eps)
    for group in _lists.grouped([item for item in items if item.log_norm is None], lambda item: item.given.dtype):
        terms = any(item.term[2] is not None for item in group)
        constants = dict(GIVEN=TYPES[group[0].given.dtype], TERMS=terms, BLOCK=BLOCK)
        works.append(Work(shared_weights_bwd_kernel, group, [], constants))
    launch(works)
    return buffer


def _item(weight: Tensor, log_norm: Tensor | None, mask: Tensor | None, grad: Tensor | None, out: Tensor,
          dlog_norm: Tensor | None, *term: Tensor | None) -> Item:  # fmt: skip
    """A vector is a matrix of one row."""
    weight, grad, out = (t[None] if t is not None and weight.dim() == 1 else t for t in (weight, grad, out))
    rows = _lists.dense_rows(weight)
    mask, grad = (None if t is None else _lists.in_order_of(rows, t) for t in (mask, grad))
    kind = PlainItem if log_norm is None else Item
    return kind(rows, mask, log_norm, grad, out, dlog_norm, out, term or (None, None, None))


def _check(grads: Sequence[Tensor | None], weights: Sequence[Tensor], *terms: Sequence[Tensor | None]) -> None:
    if any(len(ts) != len(weights) for ts in (grads, *terms)):
        raise RuntimeError(f"{len(weights)} weights: expected as many gradients, factors, u and v, None where there is none")
    for i, (g, w, factor, u, v) in enumerate(zip(grads, weights, *terms, strict=True)):
        rows = w.shape[0] if w.dim() > 1 else 1
        wanted = {"grads": (g, w.numel()), "factors": (factor, 1), "u": (u, rows), "v": (v, w.numel() // max(rows, 1))}
        for name, (t, count) in wanted.items():
            if t is not None and (t.numel() != count or t.device != w.device or (name == "grads" and t.shape != w.shape)):
                raise RuntimeError(
                    f"{name}[{i}] has shape {tuple(t.shape)} on {t.device}; expected {count} values on {w.device}"
                )
            if name != "grads" and t is not None and (t.dtype != torch.float32 or not t.is_contiguous()):
                raise RuntimeError(f"{name}[{i}] is {t.dtype} with strides {t.stride()}; expected float32, dense")
        if v is not None and factor is None:
            raise RuntimeError(f"v[{i}] without factors[{i}]: expected both or neither")
