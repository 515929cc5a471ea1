"""flow_cell in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def flow_cell(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor) -> Tensor:
    """z - m(z), m: conv 3x3, ELU, depthwise 5x5, ELU, ELU, conv 1x1; see `api.flow_cell`."""
    work = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(device_type=z.device.type, enabled=False):
        wide, w_in, w_dw, w_out, bias_out = (t.to(work) for t in (z, w_in, w_dw, w_out, bias_out))
        hidden = F.elu(F.conv2d(wide, w_in, padding=w_in.shape[-1] // 2))
        hidden = F.conv2d(hidden, w_dw, padding=w_dw.shape[-1] // 2, groups=hidden.shape[1])
        # Two ELUs: the reference's output block applies its own on top of the one after the convolution.
        hidden = F.elu(F.elu(hidden))
        return (wide - F.conv2d(hidden, w_out, bias_out)).to(z.dtype)


def flow_cells(z: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Cells one after another, of four weights each."""
    for first in range(0, len(weights), 4):
        z = flow_cell(z, *weights[first : first + 4])
    return z


def autoregressive_mask(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    groups: int = 1,
    *,
    strict: bool,
    mirror: bool,
) -> Tensor:
    """0/1 mask [out_channels, in_channels / groups, k, k] of a causal convolution, raster order, k odd.

    Rows above the centre and, in the centre's row, columns left of it are 1, what comes later is 0. At the centre
    output channel o sees input channel i when block(i) <= block(o) (strict: <), where the larger channel count is
    cut into as many equal blocks as the smaller one has channels. A depthwise convolution (groups = in_channels =
    out_channels) sees its own channel at the centre unless strict. `mirror` flips both spatial axes, which makes
    the raster order run backwards; the order of the channels stays.
    """
    depthwise = groups == in_channels == out_channels
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size}: expected an odd number, so that the kernel has a centre")
    if groups != 1 and not depthwise:
        raise ValueError(f"groups {groups}: expected 1 or a depthwise convolution (groups = in = out channels)")
    if max(out_channels, in_channels) % min(out_channels, in_channels):
        raise ValueError(f"channels {in_channels} -> {out_channels}: expected one to be a multiple of the other")

    if depthwise:
        seen = torch.full((out_channels, 1), not strict)
    else:
        out_block = torch.arange(out_channels) // max(out_channels // in_channels, 1)
        in_block = torch.arange(in_channels) // max(in_channels // out_channels, 1)
        distance = out_block[:, None] - in_block[None, :]
        seen = distance > 0 if strict else distance >= 0

    centre = kernel_size // 2
    mask = torch.zeros(*seen.shape, kernel_size, kernel_size)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    mask[:, :, centre, centre] = seen.to(mask.dtype)
    return mask.flip(2, 3) if mirror else mask
