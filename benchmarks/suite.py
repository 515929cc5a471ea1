"""Measures a case: ours and its rivals in turn, each checked against float64 before its time counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nvae_fast.benchmarks.cases import Case
from nvae_fast.benchmarks.ops import Inputs, Tensors
from nvae_fast.benchmarks.timing import Work, gpu_columns, gpu_work, graphed, interleaved, peak_bytes
from nvae_fast.kernels import _impl

PHASES = ("fwd", "fwd_bwd")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RIVALS = {"eager": "contiguous", "eager_channels_last": "channels_last"}
"""The plain composition by the layout of its inputs."""
COMPILED = {"compile": None, "max_autotune": "max-autotune-no-cudagraphs"}
"""The second of them under torch.compile, by name its mode. On a GPU every contender is recorded as a graph anyway."""
LAYOUTS = RIVALS | dict.fromkeys(COMPILED, "channels_last")
OTHERS = "channels_last"  # the layout of further rivals' inputs, as of our own
SECONDS = 30.0
"""A case ends after this time even if it had fewer rounds (at least 3)."""


@dataclass
class Runner:
    """A function with inputs of its own and the incoming gradients of its outputs (None: that one has no gradient)."""

    function: Callable[[Inputs], Tensors]
    inputs: Inputs
    gradients: Sequence[Tensor | None]

    def __call__(self, phase: str) -> list[Tensor]:
        """The outputs, with gradients off ("fwd"), or the outputs and the gradients of all leaves ("fwd_bwd")."""
        if phase == "fwd":
            with torch.no_grad():
                return list(self.function(self.inputs))
        outputs = self.function(self.inputs)
        given = [i for i, dy in enumerate(self.gradients) if dy is not None]
        return [
            *outputs,
            *torch.autograd.grad([outputs[i] for i in given], self.inputs.leaves, [self.gradients[i] for i in given]),
        ]


def implementations(case: Case, inputs: Inputs) -> list[str]:
    """Those that can run here on such inputs, the one that `auto` prefers first and the reference last. A cell has those of any
    of its parts; a part without the implementation then keeps its own rule."""
    parts = case.recipe.parts
    reasons = [item for op in parts or (case.op,) for item in _impl.explain(op, *case.recipe.given(inputs)).items()]
    names = dict.fromkeys(name for name, why in reasons if why is None and name != "reference")
    return [*names, "reference"]


def contenders(
    case: Case, device: torch.device, *, compilers: Sequence[str] = (), say: Callable[[str], None] = print
) -> tuple[dict[str, Runner], list[Tensor]]:
    """Who competes, by name, ours first, and what all of them should return: the plain op's outputs and gradients in float64.

    Where torch.compile fails it does not compete, and `say` gets a line.
    """
    given = case.inputs()
    inputs = {layout: _converted(given, device, layout) for layout in FORMATS}
    exact = _converted(given, device, "contiguous", torch.float64)
    gradients = _incoming(case.recipe.plain(exact), case.dtype)
    ours = inputs[case.layout]
    runners: dict[str, Runner] = {}
    for impl in implementations(case, ours):
        runners[f"ours:{impl}"] = _runner(partial(case.recipe.ours, impl), ours, gradients)
    for name, layout in RIVALS.items():
        runners[name] = _runner(case.recipe.plain, inputs[layout], gradients)
    for name, function in case.recipe.rivals(device).items():
        runners[name] = _runner(function, inputs[OTHERS], gradients)
    for name in compilers:
        rival = _compiled(runners["eager_channels_last"], name, say)
        runners |= {name: rival} if rival else {}
    return runners, _runner(case.recipe.plain, exact, gradients)("fwd_bwd")


def measure(
    case: Case,
    *,
    rounds: int,
    device: torch.device,
    copy_rate: float,
    compilers: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The rows of a case, ours first: one for each contender and phase. `copy_rate` is in bytes a second, read and written;
    `compilers` are names in `COMPILED`."""
    runners, truth = contenders(case, device, compilers=compilers, say=say)
    checks, peaks = {}, {}
    for phase in PHASES:
        plain = [runners[name](phase) for name in RIVALS]
        for name, run in runners.items():
            checks[name, phase] = check(run(phase), plain, truth)
            peaks[name, phase] = None if name in COMPILED else peak_bytes(partial(run, phase), device)
    eager = runners["eager"]
    forward, backward = case.recipe.traffic(eager.inputs, eager("fwd")) or (None, None)
    traffic = {"fwd": forward, "fwd_bwd": None if forward is None else forward + backward}
    calls = {f"{name} {phase}": partial(run, phase) for phase in PHASES for name, run in runners.items()}
    work: dict[str, Work] = {}
    if device.type == "cuda":
        work = {name: gpu_work(call) for name, call in calls.items()}
        calls = {name: graphed(call) for name, call in calls.items()}
    times = interleaved(calls, rounds=rounds, budget_s=SECONDS)

    rows = []
    for phase in PHASES:
        for name in runners:
            time = times[f"{name} {phase}"]
            seconds, moved = time.median_ms / 1e3, traffic[phase]
            rows.append(
                {
                    "suite": case.suite,
                    "case": case.name,
                    "op": case.op,
                    "shape": list(case.shape),
                    "dtype": case.dtype_name,
                    "layout": case.layout if name.startswith("ours:") else LAYOUTS.get(name, OTHERS),
                    "impl": name,
                    "phase": phase,
                    **time._asdict(),
                    "images_per_s": case.shape[0] / seconds if len(case.shape) == 4 else None,
                    "peak_bytes": peaks[name, phase],
                    "bytes": moved,
                    "copy_share": None if moved is None else moved / seconds / copy_rate,
                    **gpu_columns(work.get(f"{name} {phase}"), time.median_ms),
                    "check": checks[name, phase],
                }
            )
    return rows


def check(got: Tensors, plain: Sequence[Tensors], truth: Tensors) -> dict[str, Any]:
    """Whether each tensor is within 2 (error of the plain op + eps max|truth|) of the float64 truth, the plain op's error being
    the larger one of its runs in `plain`.

    error and budget are those of the tensor nearest to its limit, None where they are not finite. `truth` may hold more
    tensors than were computed.
    """
    worst: dict[str, Any] = {"ok": True, "error": 0.0, "budget": 0.0}
    share = -1.0
    for a, exact, *plains in zip(got, truth[: len(got)], *plain, strict=True):
        error, *plain_errors = ((t.double() - exact).abs().max().item() for t in (a, *plains))
        budget = 2 * (max(plain_errors) + torch.finfo(a.dtype).eps * exact.abs().max().item())
        if not math.isfinite(error + budget):
            return {"ok": False} | {k: v if math.isfinite(v) else None for k, v in (("error", error), ("budget", budget))}
        if error > share * budget:
            share = error / budget if budget else math.inf
            worst = {"ok": error <= budget, "error": error, "budget": budget}
    return worst


def _converted(given: Inputs, device: torch.device, layout: str, dtype: torch.dtype | None = None) -> Inputs:
    """A copy with leaves that require gradients; `layout` is that of four-dimensional tensors."""

    def convert(t: Tensor) -> Tensor:
        t = t.detach().to(device, dtype if t.is_floating_point() else None, copy=True)
        return t.contiguous(memory_format=FORMATS[layout]) if t.dim() == 4 else t

    return Inputs([convert(t).requires_grad_() for t in given.leaves], [convert(t) for t in given.data])


def _incoming(outputs: Tensors, dtype: torch.dtype) -> list[Tensor | None]:
    """A fixed incoming gradient for every output that has one, representable in `dtype`."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=g).to(dtype) if y.requires_grad else None for y in outputs]


def _runner(function: Callable[[Inputs], Tensors], inputs: Inputs, gradients: Sequence[Tensor | None]) -> Runner:
    """With the incoming gradients in the dtype, layout and place of the outputs."""
    pairs = zip(function(inputs), gradients, strict=True)
    return Runner(function, inputs, [None if dy is None else torch.empty_like(y).copy_(dy) for y, dy in pairs])


def _compiled(plain: Runner, name: str, say: Callable[[str], None]) -> Runner | None:
    """The same under torch.compile, as `COMPILED` says, compiled for both phases; None where that fails."""
    torch.compiler.reset()  # every case on its own: no shapes made dynamic by the case before
    try:
        run = _runner(torch.compile(plain.function, mode=COMPILED[name]), plain.inputs, plain.gradients)
        for phase in PHASES:
            run(phase)
    except Exception as error:  # of Dynamo, Inductor or the compiler it calls
        say(f"  no row for {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return run
