"""depthwise_conv against nn.functional.conv2d, channels-last: `python -m nvae_fast.benchmarks.depthwise_conv`.

Numbers are checked against float64 before a ratio is printed.
"""

from __future__ import annotations

import torch

from nvae_fast import functional as F
from nvae_fast.benchmarks.timing import interleaved

CASES = [
    ((32, 48, 32, 32), torch.float32),
    ((32, 384, 8, 8), torch.float32),
    ((32, 192, 8, 8), torch.float32),
    ((32, 768, 4, 4), torch.float32),
    ((16, 384, 16, 16), torch.float32),
    ((16, 384, 16, 16), torch.bfloat16),
]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; 5x5, ms, medians (best); ratio of medians")
    for shape, dtype in CASES:
        x = torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        w = (0.2 * torch.randn(shape[1], 1, 5, 5)).to(dtype).requires_grad_()
        dy = torch.randn_like(x)

        def both(impl: str, x=x, w=w, dy=dy):
            y = F.depthwise_conv(x, w, impl=impl)
            return y, *torch.autograd.grad(y, (x, w), dy)

        def forward(impl: str, x=x, w=w):
            return F.depthwise_conv(x.detach(), w.detach(), impl=impl)

        xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        yd = F.depthwise_conv(xd, wd)
        truth = (yd, *torch.autograd.grad(yd, (xd, wd), dy.double()))
        errors = {i: [(a.double() - t).abs().max() for a, t in zip(both(i), truth, strict=True)] for i in ("cpu", "reference")}
        budget = [2 * (e + torch.finfo(dtype).eps * t.abs().max()) for e, t in zip(errors["reference"], truth, strict=True)]
        ok = all(e <= b for e, b in zip(errors["cpu"], budget, strict=True))
        times = interleaved(
            {f"{phase.__name__} {impl}": lambda p=phase, i=impl: p(i) for phase in (both, forward) for impl in errors},
            rounds=20,
        )
        print(f"{list(shape)} {str(dtype).removeprefix('torch.')}: numbers {'ok' if ok else 'WRONG, no ratios'}")
        for phase, label in ((both, "forward + backward"), (forward, "forward")):
            ours, theirs = times[f"{phase.__name__} cpu"], times[f"{phase.__name__} reference"]
            ratio = f", {theirs.median_ms / ours.median_ms:.2f}x" if ok else ""
            figures = [f"{t.median_ms:.2f} ({t.min_ms:.2f})" for t in (theirs, ours)]
            print(f"  {label:18}  reference {figures[0]}  cpu {figures[1]}{ratio}")


if __name__ == "__main__":
    main()
