"""The roofline of a run: operations a second against operations a byte, below what copies and dense convolutions reach here.

Operations are those of the plain formulation, counted on tensors without values: whoever computes more gains nothing by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae_fast.benchmarks.cases import Case
from nvae_fast.benchmarks.ops import Inputs
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.suite import Runner

PHASE = "fwd_bwd"
COLOURS = {True: "#1f6fb4", False: "#b0b0b0"}

aten = torch.ops.aten
FREE = {aten.clone, aten.copy_, aten._to_copy, aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_like, aten.fill_,
        aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_empty, aten.new_empty_strided, aten.zero_}  # fmt: skip
PER_VALUE = {  # multiply-adds of each value of (the output, or the argument of that number), from the arguments
    aten.convolution: (None, lambda a: a[1][0].numel()),
    aten.convolution_backward: (0, lambda a: a[2][0].numel() * sum(a[-1][:2])),
    aten.mm: (None, lambda a: a[0].shape[1]),
    aten.addmm: (None, lambda a: a[1].shape[1]),
    aten.bmm: (None, lambda a: a[0].shape[2]),
    aten.mv: (0, lambda a: 1),
    aten.dot: (0, lambda a: 1),
}


class Operations(TorchDispatchMode):
    """Counts what PyTorch computes inside: a multiply-add of a convolution or a product as two operations, any other function
    as one for each value that it reads or writes, whichever are more; views, copies and fills as none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in PER_VALUE:
            which, each = PER_VALUE[packet]
            self.count += 2 * (found if which is None else args[which]).numel() * each(args)
        elif func.namespace == "aten" and not func.is_view and packet not in FREE:
            self.count += max(_values(args), _values(found))
        return found


def operations(case: Case) -> int:
    """Those of the plain op, forward and backward."""
    given = case.inputs()
    with FakeTensorMode() as fake:
        leaves = [fake.from_tensor(t).requires_grad_() for t in given.leaves]
        inputs = Inputs(leaves, [fake.from_tensor(t) for t in given.data])
        outputs = case.recipe.plain(inputs)
        gradients = [torch.empty_like(y) if y.requires_grad else None for y in outputs]
        with Operations() as counted:
            Runner(case.recipe.plain, inputs, gradients)(PHASE)
    return counted.count


def points(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a place under the roof: of ops whose bytes are known, with right numbers."""
    return [r for r in rows if r["suite"] == "ops" and r["phase"] == PHASE and r["bytes"] and r["check"]["ok"]]


def draw(panel: Any, rows: list[Row], rates: dict[str, float]) -> None:
    """Draws `points`, each contender's best round, into a panel of matplotlib, under the rates of `report.rates`."""
    copied, peak = rates["copy"], rates["products"]
    cases = {r["case"]: Case("ops", r["op"], tuple(r["shape"]), getattr(torch, r["dtype"])) for r in rows}
    counts = {name: operations(case) for name, case in cases.items()}
    named: set[str] = set()
    for r in rows:
        x, y = counts[r["case"]] / r["bytes"], counts[r["case"]] / r["min_ms"] / 1e6
        ours = r["impl"].startswith("ours:") and r["case"] not in named  # the first is what `auto` prefers
        panel.plot(x, y, "o", color=COLOURS[ours], markersize=7 if ours else 3.5, zorder=3 if ours else 2)
        if ours:
            named.add(r["case"])
            panel.annotate(
                r["case"].removesuffix("/float32"), (x, y), xytext=(4, 5), textcoords="offset points", rotation=25, fontsize=7
            )
    ends = [
        min(counts[r["case"]] / r["bytes"] for r in rows) / 2,
        max(peak / copied, *(counts[r["case"]] / r["bytes"] for r in rows)) * 4,
    ]
    roof = [ends[0], peak / copied, ends[1]]
    panel.plot(roof, [min(copied * x, peak) / 1e9 for x in roof], color="black", linewidth=1)
    panel.set(xscale="log", yscale="log", xlabel="operations a byte that has to move", ylabel="operations a second, 1e9")
    panel.set_title(
        f"forward and backward, best rounds: ours large, rivals small; roof: copy {copied / 1e9:.0f} GB/s, "
        f"dense 3x3 convolution {peak / 1e9:.0f}e9", loc="left", fontsize=9,
    )  # fmt: skip
    panel.spines[["top", "right"]].set_visible(False)


def _values(found: Any) -> int:
    return max((t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)), default=0)
