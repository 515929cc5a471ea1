"""Batch normalisation as a part of other ops: its state, its coefficients, and what moves once per training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ACTIVATIONS = ("identity", "swish", "elu")  # their positions are the codes of the native kernels


class Norm(NamedTuple):
    """A batch normalisation over C channels, u = weight (x - mean) / sqrt(var + eps) + bias, as fused ops take it.

    weight, bias, running_mean, running_var: [C] or None; num_batches_tracked: integer scalar or None; the rest as in
    nn.BatchNorm2d. stats: mean and biased variance [2, C] of the batch where an op has returned them for its output, so that
    they are not taken again; they carry no gradient, being a function of x that the backward accounts for. Or, instead of
    these, the table [5, C] of this very normalisation, which `se_residual(next_norm=...)` has returned with the running
    statistics moved. offset: [C] or None, a bias that x lacks, u being of x + offset. Statistics of the batch take it away
    again: the running mean alone moves by it, and its gradient is 0.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.05
    eps: float = 1e-5
    process_group: dist.ProcessGroup | None = None
    stats: Tensor | None = None
    offset: Tensor | None = None

    def uses_batch(self) -> bool:
        """Statistics are the batch's, not the running ones."""
        return self.training or self.running_mean is None

    def finished(self) -> bool:
        """There is nothing left to take, nor to move."""
        return self.stats is not None and len(self.stats) == 5

    def group(self) -> dist.ProcessGroup | None:
        """The processes to join batches with, when there is more than one."""
        joined = self.training and self.process_group is not None and dist.get_world_size(self.process_group) > 1
        return self.process_group if joined else None


class Parts(NamedTuple):
    """The tensors of a Norm as an autograd function takes them: weight, bias, offset and stats in float32 (stats [2, C] of x
    stand fixed, as in evaluation, or were taken already; a table [5, C] is all that there is to do; None where they are to be
    taken), then what a batch moves (None: nothing). Or the gradients of these."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    offset: Tensor | None = None
    stats: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None


class Following(NamedTuple):
    """The last arguments of a raw op that takes statistics of its output, in `FOLLOWING` of its schema: the normalisation that
    follows, for which it then returns the table bn [5, C] in the place of mean and variance [2, C], with the running statistics
    moved. numbers: eps, momentum, and how many times the normalised image has every pixel; empty: no normalisation is known."""

    numbers: Sequence[float] = ()
    weight: Tensor | None = None
    bias: Tensor | None = None
    offset: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batches: Tensor | None = None

    def rows(self, stats: bool) -> int:
        """Rows of what the op returns."""
        return (5 if self.numbers else 2) if stats else 0


FOLLOWING = (
    "float[] numbers=[], Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? norm_offset=None, "
    "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor(c!)? batches=None"
)


class NormConfig(NamedTuple):
    """What an autograd function needs of a Norm beside its tensors. Where the normalised image has every pixel of x `copies`
    times, the running variance moves by the unbiased variance of so many values."""

    eps: float
    momentum: float | None
    uses_batch: bool
    group: dist.ProcessGroup | None
    copies: int


def check_beside(x: Tensor, *, called: str = "x", **tensors: Tensor | None) -> None:
    """Raises in one line where one of the named tensors is no floating-point tensor on the device of x, which is `called` so by
    the caller. A tensor on "meta" among others would silently make an op return its shapes alone."""
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name} is {t.dtype}: expected a floating-point tensor; convert it with .float()")
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{name} is on {t.device}: expected {x.device}, where {called} is; move it there with .to({called}.device)"
            )


def check_norm(norm: Norm, x: Tensor, channels: int, name: str = "norm") -> None:
    """Raises ValueError or TypeError in one line where the norm's parts do not fit together, `channels`, or the device of x."""
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither; pass None for both to go without")
    for field in ("weight", "bias", "offset", "running_mean", "running_var"):
        t = getattr(norm, field)
        if t is not None and t.shape != (channels,):
            raise ValueError(f"{field} of shape {tuple(t.shape)}: expected ({channels},), the channels of {name}")
    if norm.stats is not None and norm.stats.shape not in ((2, channels), (5, channels)):
        raise ValueError(
            f"stats of shape {tuple(norm.stats.shape)}: expected (2, {channels}), mean and variance of {name}, "
            f"or (5, {channels}), what se_residual(next_norm=...) returns"
        )
    if norm.finished() and not norm.uses_batch():
        raise ValueError("stats of a finished normalisation, which uses those of the batch: expected training, or stats=None")
    check_beside(x, **{f: getattr(norm, f) for f in ("weight", "bias", "offset", "running_mean", "running_var", "stats")})
    if not norm.eps >= 0:
        raise ValueError(f"eps {norm.eps}: expected a number >= 0, such as 1e-5")
    if norm.momentum is not None and not 0 <= norm.momentum <= 1:
        raise ValueError(f"momentum {norm.momentum}: expected a number from 0 to 1, or None to average all batches")
    if norm.training and norm.momentum is None and norm.running_mean is not None and norm.num_batches_tracked is None:
        raise ValueError("momentum None averages over all batches: pass num_batches_tracked, or a momentum")


def check_batch(norm: Norm, values: int, shape: Sequence[int]) -> None:
    """Raises ValueError where batch statistics would be taken over a single value per channel."""
    if norm.uses_batch() and values == 1 and norm.group() is None:
        raise ValueError(
            f"x of shape {tuple(shape)}: batch statistics need more than 1 value per channel; "
            "use a larger batch or training=False"
        )


def autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """(x, *others) as autocast would have them."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch does not know autocast on "meta"
        return x, *others
    kept = torch.float64  # which autocast leaves alone
    return tuple(t if t.dtype == kept else t.to(torch.get_autocast_dtype(kind)) for t in (x, *others))


def shared(given: Tensor, read: Tensor, passed: Sequence[Tensor]) -> Sequence[Tensor]:
    """The argument x of an op, for all who read it beside the op: as its autograd function `passed` it through, which adds the
    other gradients in a pass of its own backward, or as it was `given` where the function `read` a cast of it or there is no
    gradient to add to."""
    return passed if given.requires_grad and given.dtype == read.dtype else [given] * len(passed)


READERS = 2  # beside an op, of an x that it hands on: what the last pass of a backward adds


def check_readers(return_x: int) -> int:
    """How many times an op hands on its x; ValueError where that is too many."""
    if not 0 <= return_x <= READERS:
        raise ValueError(f"return_x {return_x}: expected how many others read x, {READERS} at most")
    return int(return_x)


def others(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients among those of an x that was handed on: some of its readers may have none."""
    return [g for g in grads if g is not None]


def total(grads: Sequence[Tensor]) -> Tensor | None:
    """Their sum, where there is nothing else to add them to."""
    return sum(grads[1:], grads[0]) if grads else None


def tensors(norm: Norm) -> Parts:
    given = norm.weight, norm.bias, norm.offset, norm.stats
    weight, bias, offset, stats = (None if t is None else t.float() for t in given)
    if not norm.uses_batch():
        mean = norm.running_mean.float()  # of x + offset
        stats = torch.stack((mean if offset is None else mean - offset.detach(), norm.running_var.float()))
    moves = norm.training and norm.running_mean is not None
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked) if moves else ()
    return Parts(weight, bias, offset, stats, *running)


def config(norm: Norm, copies: int = 1) -> NormConfig:
    return NormConfig(norm.eps, norm.momentum, norm.uses_batch(), norm.group(), copies)


def following(p: Parts, c: NormConfig) -> Following:
    """What the op that takes the statistics is told of the normalisation. None of it where they are joined with those of other
    processes first, where the rate depends on the counter that goes with it, or where there are none to take."""
    if p.stats is not None or c.group is not None or (c.momentum is None and p.running_mean is not None):
        return Following()
    return Following((c.eps, c.momentum or 0.0, c.copies), p.weight, p.bias, p.offset, p.running_mean, p.running_var, p.batches)


def following_of(norm: Norm | None) -> Following:
    """The same of a norm whose op takes part in no gradient of it; nothing where it takes no statistics of the batch."""
    if norm is None or not norm.uses_batch():
        return Following()
    parts = (None if t is None else t.detach() for t in tensors(norm))
    return following(Parts(*parts), config(norm))


def coefficients(x: Tensor, p: Parts, c: NormConfig) -> tuple[Tensor, float]:
    """(bn [5, C] = mean, var, 1/sigma, scale, shift; the number of values a gradient is averaged over) of the input x, with the
    running statistics moved: here, unless what took the statistics has done that as well."""
    raw, stats = torch.ops.nvae_fast, p.stats
    count = float(x.numel() // max(x.shape[1], 1))
    if stats is None:
        stats = raw.bn_act_stats(x, *following(p, c))
    if len(stats) == 5:
        return stats, count
    if not c.uses_batch:
        count = float("inf")  # fixed statistics: nothing of the gradient goes through them
    elif c.group is not None:
        stats, count = _join(stats, count, c.group)
    running = p.running_mean, p.running_var, p.batches
    numbers = c.momentum, count * c.copies
    return raw.bn_act_coefficients(stats, p.weight, p.bias, c.eps, *running, *numbers, p.offset), count


def gradients(table: Tensor, bn: Tensor, count: float, c: NormConfig, wanted: Sequence[bool]) -> tuple[Tensor, Parts]:
    """(c [3, C] of dx = c0 du + c1 x + c2, the gradients of those parts that are `wanted`) from a table of gradients [7, C]."""
    coef = table[3:6]
    if c.group is not None:  # dx wants the sums of all processes; dweight and dbias stay this one's, as in SyncBatchNorm
        total = table[:2].clone()
        dist.all_reduce(total, group=c.group)
        coef = torch.ops.nvae_fast.bn_act_gradients(total, bn, count)[3:6]
    found = (table[row] if w else None for row, w in zip((2, 0, 6), wanted[:3], strict=True))
    return coef, Parts(*found)


def applied_gradients(
    dbn: Tensor, bn: Tensor, count: float, c: NormConfig, wanted: Sequence[bool]
) -> tuple[Tensor | None, Parts]:
    """The same of a normalisation that another op applied to the whole of x, from the gradient dbn [5, C] that it returned
    (`bn_act.ops.ApplyNorm`): dx = du + c1 x + c2, where du holds the scale, so that c is [2, C], or None where dx = du."""
    coef = dbn[1:3] if c.uses_batch else None  # fixed statistics do not depend on x
    if c.group is not None:
        total = dbn[3:].flip(0)
        dist.all_reduce(total, group=c.group)
        coef = torch.ops.nvae_fast.bn_act_gradients(total, bn, count)[4:6]
    dweight, dbias = (dbn[row] if w else None for row, w in zip((0, 4), wanted[:2], strict=True))
    doffset = None if not wanted[2] else torch.zeros_like(bn[3]) if c.uses_batch else bn[3] * dbn[4]
    return coef, Parts(dweight, dbias, doffset)


def _join(stats: Tensor, count: float, group: dist.ProcessGroup) -> tuple[Tensor, float]:
    """Mean and variance of the joined batches of a group, and their count; in rank order, in double (Chan et al. 1983)."""
    mine = torch.cat((stats.double().flatten(), stats.new_tensor([count], dtype=torch.float64)))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    gathered = torch.stack(parts)
    counts = gathered[:, -1:]
    mean, var = gathered[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    joined = (mean * counts).sum(0) / total
    spread = ((var + (mean - joined).square()) * counts).sum(0) / total
    return torch.stack((joined, spread)).to(stats.dtype), float(total)
