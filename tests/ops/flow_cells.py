"""What the tests of flow_cell's implementations share: inputs with weights of several kinds, a run with all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.kernels.flow_cell import autoregressive_mask, flow_cell, flow_cells

WEIGHTS = ["masked", "mirrored", "dense", "holes"]


def weight_masks(z: int, e: int, kind: str) -> list[Tensor]:
    masks = [torch.ones(e, z, 3, 3), torch.ones(e, 1, 5, 5), torch.ones(z, e, 1, 1)]
    if kind in ("masked", "mirrored"):  # spatially as autoregressive_mask, whose channel rule wants multiples
        for i, k in enumerate((3, 5)):
            masks[i] *= autoregressive_mask(e, e, k, groups=e, strict=False, mirror=kind == "mirrored")
        masks[0][: e // 2, :, 1, 1] = 0
    elif kind == "holes":  # rows without a live tap, a dead tap between live ones
        masks[0][:, :, 0] = masks[0][:, :, 1, 1] = 0
        masks[1][:, :, 1:4, 2] = masks[1][:, :, 4] = 0
    return masks


def make(b, z, e, h, w, dtype=torch.float32, kind="masked", seed=0):
    g = torch.Generator().manual_seed(seed)
    scales = (0.7 / z**0.5, 0.3, 1 / e**0.5)
    weights = [scale * torch.randn(m.shape, generator=g) * m for m, scale in zip(weight_masks(z, e, kind), scales, strict=True)]
    args = [torch.randn(b, z, h, w, generator=g), *weights, torch.randn(z, generator=g)]
    return [t.to(dtype) for t in args], torch.randn(b, z, h, w, generator=g).to(dtype)


def run(args, dy, impl):
    args = [t.detach().requires_grad_() for t in args]
    y = flow_cell(*args, impl=impl)
    return y.detach(), *torch.autograd.grad(y, args, dy)


def make_flow(b, z, e, h, w, dtype=torch.float32, kinds=("masked", "mirrored", "dense")):
    """z, the weights of one cell of each kind, a gradient."""
    cells = [make(b, z, e, h, w, dtype, kind, seed=i) for i, kind in enumerate(kinds)]
    return cells[0][0][0], [args[1:] for args, _ in cells], cells[0][1]


def run_flow(z, cells, dy, impl, whole=True):
    """The flow and all gradients, in one op or in one for each cell."""
    z, cells = z.detach().requires_grad_(), [[w.detach().requires_grad_() for w in cell] for cell in cells]
    if whole:
        y = flow_cells(z, *zip(*cells, strict=True), impl=impl)
    else:
        y = z
        for cell in cells:
            y = flow_cell(y, *cell, impl=impl)
    return y.detach(), *torch.autograd.grad(y, [z, *(w for cell in cells for w in cell)], dy)


def same(these, those) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))
