"""Residual cells, their skip connections, the table of architectures, and the combiners."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.act_conv import BN_EPS, BN_MOMENTUM, ActConv, chain_of, chained
from nvae_fast.errors import InputError
from nvae_fast.kernels._constant import constant
from nvae_fast.layers import InvertedResidual, SqueezeExcite, WeightNormConv2d, effective


def _arch(enc: list[str], dec: list[str], pre: list[str], post: list[str]) -> dict[str, list[str]]:
    return {"enc": enc, "dec": dec, "pre": pre, "post": post}


def _twice(op: str) -> dict[str, list[str]]:
    return _arch([op] * 2, [op] * 2, [op] * 2, [op] * 2)


def _encoder_decoder(enc: list[str], kernel: int) -> dict[str, list[str]]:
    return _arch(enc, [f"mconv_e6k{kernel}g0"], enc, [f"mconv_e3k{kernel}g0"])


ARCHITECTURES: dict[str, dict[str, list[str]]] = {
    "res_elu": _twice("res_elu"),
    "res_bnelu": _twice("res_bnelu"),
    "res_bnswish": _twice("res_bnswish"),
    "mbconv_sep": _arch(["mconv_e6k5g0"], ["mconv_e6k5g0"], ["mconv_e3k5g0"], ["mconv_e3k5g0"]),
    "mbconv_sep11": _arch(["mconv_e6k11g0"], ["mconv_e6k11g0"], ["mconv_e3k5g0"], ["mconv_e3k5g0"]),
    "res_mbconv": _encoder_decoder(["res_bnswish", "res_bnswish"], 5),
    "res53_mbconv": _encoder_decoder(["res_bnswish5", "res_bnswish"], 5),
    "res35_mbconv": _encoder_decoder(["res_bnswish", "res_bnswish5"], 5),
    "res55_mbconv": _encoder_decoder(["res_bnswish5", "res_bnswish5"], 5),
    "res_mbconv9": _encoder_decoder(["res_bnswish", "res_bnswish"], 9),
    "mbconv_res": _arch(["mconv_e6k5g0"], ["res_bnswish"] * 2, ["mconv_e3k5g0"], ["res_bnswish"] * 2),
    "mbconv_den": _arch(["mconv_e6k5g0"], ["mconv_e6k5g0"], ["mconv_e3k5g8"], ["mconv_e3k5g8"]),
}
"""The ops of a cell by architecture and place: bottom-up tower, top-down tower, before, and behind them."""

_RESIDUAL_OPS = {  # activation, BN before it, dilation of the 3x3
    "res_elu": ("elu", False, 1),
    "res_bnelu": ("elu", True, 1),
    "res_bnswish": ("swish", True, 1),
    "res_bnswish5": ("swish", True, 2),
}


def build_op(name: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The op of that name: a row of _RESIDUAL_OPS, or `mconv_e{expansion}k{kernel}g{groups, 0 = depthwise}`."""
    if name in _RESIDUAL_OPS:
        act, bn, dilation = _RESIDUAL_OPS[name]
        return ActConv(in_channels, out_channels, act=act, bn=bn, stride=stride, dilation=dilation)
    match = re.fullmatch(r"mconv_e(\d+)k(\d+)g(\d+)", name)
    if match is None:
        raise InputError(f"unknown op '{name}': expected one of {', '.join(_RESIDUAL_OPS)} or mconv_e6k5g0 and the like")
    expansion, kernel_size, groups = map(int, match.groups())
    return InvertedResidual(in_channels, out_channels, expansion=expansion, kernel_size=kernel_size, stride=stride,
                            groups=groups, eps=BN_EPS, momentum=BN_MOMENTUM)  # fmt: skip


class FactorizedReduce(nn.Module):
    """Halves H and W (both even): four stride-2 1x1 convolutions of swish(x) at the four pixel offsets, concatenated.

    They run as one 2x2 convolution of stride 2, whose filters have one live tap each. A pixel that is NaN or infinite therefore
    makes all channels NaN where it is seen, not those of its own convolution alone: the other filters hold zeros there.
    """

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))  # (row, column) that conv_1 ... conv_4 see of each 2x2 pixels

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        for i, width in enumerate((quarter, quarter, quarter, out_channels - 3 * quarter), start=1):
            setattr(self, f"conv_{i}", WeightNormConv2d(in_channels, width, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise InputError(f"images of {x.shape[2]}x{x.shape[3]} cannot be halved: expected even sides")
        return tf.conv2d(tf.silu(x), *self.filters(), stride=2)

    def filters(self) -> tuple[Tensor, Tensor]:
        """(weight [O, C, 2, 2], bias [O]) of that convolution."""
        convs = (self.conv_1, self.conv_2, self.conv_3, self.conv_4)
        live = torch.cat([conv.effective_weight() for conv in convs]).flatten(1)  # [O, C]
        widths = tuple(conv.out_channels for conv in convs)
        taps = constant(("taps", widths), live, lambda: torch.tensor(self._taps(widths)))
        filters = live.new_zeros(len(live), 4, live.shape[1])  # [O, taps, C], channels-last
        filters = filters.scatter_(1, taps[:, None, None].expand(-1, 1, live.shape[1]), live[:, None])
        return filters.unflatten(1, (2, 2)).permute(0, 3, 1, 2), torch.cat([effective(conv, "bias") for conv in convs])

    def _taps(self, widths: tuple[int, ...]) -> list[int]:
        """The live one of each filter's four taps."""
        return [2 * row + column for width, (row, column) in zip(widths, self.OFFSETS, strict=True) for _ in range(width)]


class UpsampleProject(nn.Module):
    """Doubles H and W: bilinear (corners aligned) and a 1x1 convolution without bias, which comes first: they commute."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.conv(x))


def doubled(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, C, 2 H, 2 W], bilinear with aligned corners. torch's own, but on a GPU, where that adds gradients in
    any order: two products with constant matrices instead, of rows and of columns, whose gradients are products too."""
    if not by_products(x.device):
        return tf.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    rows, columns = (constant(("doubled", n, x.dtype), x, partial(doubling, n, x.dtype)) for n in x.shape[2:])
    b, c, h, w = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(b, h, w * c)
    lines = torch.bmm(rows.expand(b, -1, -1), lines).view(b * 2 * h, w, c)
    return torch.bmm(columns.expand(b * 2 * h, -1, -1), lines).view(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def by_products(device: torch.device) -> bool:
    """Whether images are doubled so."""
    return device.type == "cuda"


def doubling(n: int, dtype: torch.dtype) -> Tensor:
    """[2 n, n]: what each of 2 n pixels takes of n, the first and the last from the corners. Shares are rounded so that
    those of a pixel are 1 together in `dtype`."""
    at = torch.arange(2 * n, dtype=torch.float64) * (n - 1) / (2 * n - 1)
    left = at.floor().clamp(max=max(n - 2, 0))
    unit = torch.finfo(dtype).eps / 2
    share = ((at - left) / unit).round() * unit
    matrix = torch.zeros(2 * n, n, dtype=torch.float64)
    matrix.scatter_add_(1, left.long()[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (left.long() + 1).clamp(max=n - 1)[:, None], share[:, None])
    return matrix.to(dtype)


class Cell(nn.Module):
    """out = skip(x) + 0.1 * SE(op_n(... op_1(x))). `stride` 1 keeps, 2 halves and -1 doubles the resolution (in op_1).

    Biases of its 3x3 convolutions are added by what reads their output, the next BN or the residual sum: such an op called by
    itself returns its output without.
    """

    def __init__(self, in_channels: int, out_channels: int, ops: list[str], *, stride: int, use_se: bool) -> None:
        super().__init__()
        skips = {1: lambda *_: nn.Identity(), 2: FactorizedReduce, -1: UpsampleProject}
        self.skip = skips[stride](in_channels, out_channels)
        self.ops = nn.ModuleList(
            build_op(op, in_channels if i == 0 else out_channels, out_channels, stride if i == 0 else 1)
            for i, op in enumerate(ops)
        )
        self.se = SqueezeExcite(out_channels) if use_se else None
        for op, behind in zip(self.ops, [*self.ops[1:], None], strict=True):
            if isinstance(op, ActConv):  # the residual sum takes its bias, or a BN, for nothing; a pass of its own would not
                op.conv.adds_bias = behind is not None and not (isinstance(behind, ActConv) and behind.bn is not None)

    @property
    def first_norm(self) -> F.Norm | None:
        """The normalisation of x, every pixel of it once, that the first op begins with."""
        op = self.ops[0]
        bn = op.bn if isinstance(op, ActConv) else None if op.upsample else op.bn_in
        return None if bn is None else bn.norm

    def forward(self, x: Tensor, stats: Tensor | None = None, *, return_stats: bool = False,
                next_norm: F.Norm | None = None, return_x: bool = False) -> Any:  # fmt: skip
        """`stats`: of x where the op before has returned them, as `functional.Norm` takes them; `return_stats`: return (out,
        stats of out), the latter None where they do not come for nothing; `next_norm`: the normalisation of out that follows,
        as `functional.se_residual` takes it; `return_x`: and x behind them, for what else reads it."""
        ops = list(self.ops)
        options: dict[str, Any] = {} if stats is None else {"stats": stats}
        if x.requires_grad and torch.is_grad_enabled():
            options["return_x"] = 1 + return_x  # the backward of the first op then adds all gradients of x
        passed, y, rest, bias = [x, x], x, [], None
        while ops:
            chain = chain_of(ops, y)
            op, ops = chain[-1], ops[len(chain) :]
            if len(chain) > 1:
                found = chained(chain, y, return_means=self.se is not None and not ops, **options)
            elif isinstance(op, InvertedResidual) and not ops:
                found = op.branch(y, return_means=self.se is not None, **options)
            else:
                found = op(y, **options)
            y, *rest = found if isinstance(found, tuple) else (found,)
            if "return_x" in options:
                rest, passed = rest[: -options["return_x"]], rest[-options["return_x"] :]
            bias = op.conv.bias if isinstance(op, ActConv) and not op.conv.adds_bias else None
            options = {} if bias is None else {"offset": bias}
        # the last normalisation of a branch, done where it joins the skip connection, and the means that are squeezed
        bn, means = (*rest, None, None)[:2]
        options = {"bn": bn, "bias": bias, "return_stats": return_stats, "next_norm": next_norm}
        if self.se is not None:
            found = self.se.residual(self.skip(passed[0]), y, x_means=means, **options)
        else:
            found = F.se_residual(self.skip(passed[0]), y, None, None, None, None, **options)
        return (*(found if return_stats else (found,)), passed[1]) if return_x else found


class EluConv(nn.Sequential):
    """ELU, then a weight-normalised 1x1 convolution with bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.ELU(), WeightNormConv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, *, return_x: bool = False) -> Any:
        """`return_x`: return (y, x), as `functional.pointwise_conv` does."""
        return self[1].product(x, act="elu", return_x=int(return_x))


class EncoderCombiner(nn.Module):
    """e + Conv1x1(h): the bottom-up feature e of a group joined with the top-down state h."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(decoder_channels, encoder_channels, 1)

    def forward(self, e: Tensor, h: Tensor, *, return_x: bool = False) -> Any:
        """`return_x`: return (y, h), as `functional.pointwise_conv` does."""
        return self.conv.product(h, addend=e, return_x=int(return_x))


class DecoderCombiner(nn.Module):
    """Conv1x1(concat[h, z]): the drawn latent enters the top-down state. Nothing is concatenated."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(channels + latent_channels, channels, 1)

    def forward(self, h: Tensor, z: Tensor, **options: Any) -> Any:
        """`options`: `return_stats` and `next_norm`, as of `Cell.forward`."""
        return self.conv.product(h, beside=z, **options)


def run_cells(
    modules: Sequence[nn.Module],
    h: Tensor,
    combine: Callable[..., Any] | None = None,
    look: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Cells one after the other. A DecoderCombiner among them is called as combine(module, h, return_stats=, next_norm=), an
    EncoderCombiner only sees h, as look(h): as the cell behind it hands h on, which then adds the gradient that comes back with
    its own. In training each hands on the statistics of its output where the next one normalises it first: they come for
    nothing, and with them that normalisation, finished."""
    stats, seen = None, False
    for i, module in enumerate(modules):
        behind = next((m for m in modules[i + 1 :] if not isinstance(m, EncoderCombiner)), None)
        wanted = module.training and isinstance(behind, Cell)
        options = {"return_stats": wanted, "next_norm": behind.first_norm if wanted else None}
        if isinstance(module, EncoderCombiner):
            if isinstance(behind, Cell):
                seen = True
            else:
                look(h)
        elif not isinstance(module, Cell):
            found = combine(module, h, **options)
            h, stats = found if wanted else (found, None)
        else:
            found = module(h, stats, **options, return_x=seen)
            h, *rest = found if isinstance(found, tuple) else (found,)
            if seen:
                look(rest[-1])
            stats, seen = rest[0] if len(rest) > seen else None, False
    return h
