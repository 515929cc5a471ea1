"""power_iteration in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    iterations: int,
    eps: float = 1e-3,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """sigma [L] and the new u, v; see `api.power_iteration`. Matrices of one shape share batched products."""
    sigma: list[Tensor | None] = [None] * len(weights)
    new_u: list[Tensor | None] = [None] * len(weights)
    new_v: list[Tensor | None] = [None] * len(weights)
    with torch.autocast(device_type=weights[0].device.type, enabled=False):
        for members in _by_shape(weights).values():
            # float64 only when every matrix of the stack is.
            wide = [weights[i].to(torch.promote_types(weights[i].dtype, torch.float32)) for i in members]
            matrices = torch.stack([w.reshape(w.shape[0], -1) for w in wide])
            with torch.no_grad():
                left = torch.stack([u[i].to(matrices.dtype) for i in members]).unsqueeze(-1)
                right = torch.stack([v[i].to(matrices.dtype) for i in members]).unsqueeze(-1)
                for _ in range(iterations):
                    right = _unit(torch.bmm(matrices.transpose(1, 2), left), eps)
                    left = _unit(torch.bmm(matrices, right), eps)
            # u and v are constants here, so d sigma / d W = u v^T.
            values = (left * torch.bmm(matrices, right)).sum(dim=(1, 2))
            # clone: the rows would otherwise be views that keep the whole stack alive.
            for k, i in enumerate(members):
                sigma[i] = values[k]
                new_u[i], new_v[i] = left[k, :, 0].clone(), right[k, :, 0].clone()
    return torch.stack(sigma), new_u, new_v


def _by_shape(weights: Sequence[Tensor]) -> dict[tuple, list[int]]:
    """Indices of the weights by (rows, columns, dtype), in order of first appearance."""
    groups: dict[tuple, list[int]] = {}
    for i, w in enumerate(weights):
        groups.setdefault((w.shape[0], w[0].numel(), w.dtype), []).append(i)
    return groups


def _unit(a: Tensor, eps: float) -> Tensor:
    return a / torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp(min=eps)
