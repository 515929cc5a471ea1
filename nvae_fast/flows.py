"""Volume-preserving autoregressive flows on the posterior sample: z <- z - m(z), a pair of directions per cell."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.layers.conv import LOG_TENTH, MaskedConv2d


class AutoregressiveShift(nn.Module):
    """z - m(z), where m at a pixel sees only earlier pixels (later ones with `mirror`) and earlier channels.

    m: masked 3x3 (Z -> 6Z, strict) -> ELU -> masked depthwise 5x5 -> ELU -> ELU -> masked 1x1 (6Z -> Z, bias). The Jacobian is
    unit triangular: log|det| = 0.
    """

    def __init__(self, latent_channels: int, *, mirror: bool) -> None:
        super().__init__()
        z, hidden = latent_channels, 6 * latent_channels
        self.conv_in = MaskedConv2d(z, hidden, 3, strict=True, mirror=mirror)
        self.depthwise = MaskedConv2d(hidden, hidden, 5, groups=hidden, mirror=mirror)
        self.conv_out = MaskedConv2d(hidden, z, 1, bias=True, mirror=mirror, log_norm_shift=LOG_TENTH)

    def forward(self, z: Tensor) -> Tensor:
        return _shifted(z, [self])


class FlowCell(nn.Module):
    """Two autoregressive shifts, the second in mirrored pixel order."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.cell1 = AutoregressiveShift(latent_channels, mirror=False)
        self.cell2 = AutoregressiveShift(latent_channels, mirror=True)

    def forward(self, z: Tensor) -> Tensor:
        return run_flow([self], z)


def run_flow(cells: Iterable[FlowCell], z: Tensor) -> Tensor:
    """z moved by one cell after another, in one op."""
    return _shifted(z, [shift for cell in cells for shift in (cell.cell1, cell.cell2)])


def _shifted(z: Tensor, shifts: Iterable[AutoregressiveShift]) -> Tensor:
    weights = [[conv.effective_weight() for conv in (s.conv_in, s.depthwise, s.conv_out)] for s in shifts]
    return F.flow_cells(z, *zip(*weights, strict=True), [s.conv_out.bias for s in shifts])
