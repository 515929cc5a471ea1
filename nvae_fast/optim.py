"""The optimiser of NVAE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamax import adamax

from nvae_fast.kernels.adamax import Arena, fits
from nvae_fast.model import NVAE

Decide = Callable[[Tensor], "tuple[Tensor | None, Tensor | None]"]


class FusedAdamax(torch.optim.Adamax):
    """torch.optim.Adamax whose parameters and state lie in a few long buffers: a step is one pass, and may average the weights.

    Same arguments, defaults, param groups and state (`step`, `exp_avg`, `exp_inf`): state dicts go both ways. A step differs
    from torch's by rounding alone. With `ema_decay` d, every parameter also has the state `ema`, the average
    ema <- d ema + (1 - d) param over the steps taken, from the parameter before the first one.

    The first step moves the data of the parameters, whose shapes and strides stay, as `model.to` does: tensors that shared the
    memory of a parameter no longer do. Parameters, state and groups may be moved, replaced or loaded at any time; the next step
    packs them again. Gradients stay autograd's own.

    Parameters that are not plain float32 ones with memory of their own (`kernels.adamax.fits`), groups that are
    `differentiable`, or `capturable` on the CPU, and the inside of torch.compile take torch's own implementation; `foreach`
    says which one, and nothing where ours runs.

    Formula, order of operations and source: `nvae_fast.kernels.adamax.Arena`.
    """

    ema_decay: float | None = None
    _arenas: list[tuple[Arena | None, list[Tensor]]] | None = None  # of each group: its arena, and what does not fit one
    _seen: list[int]

    def __init__(self, *args: Any, ema_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay {ema_decay}: expected a number from 0 to below 1, or None")
        self.ema_decay = ema_decay

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"ema_decay": self.ema_decay}

    def step(self, closure: Callable[[], Any] | None = None, *, decide: Decide | None = None) -> Any:
        """One step on every parameter that has a gradient. Returns what `closure`, which is called first, returns.

        `decide(squares)` is given the sum of the squares of all gradients, a float64 scalar on their device that is finite just
        where all of them are. It returns (factor, take), scalars there or None: a float32 that multiplies the gradients, and a
        bool without which nothing changes.

        Raises RuntimeError for sparse gradients, as torch.optim.Adamax does, and for `decide` or `ema_decay` with parameters
        that take torch's implementation.
        """
        if torch.compiler.is_compiling():
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step(decide)
        return loss

    def _step(self, decide: Decide | None) -> None:
        if self._arenas is None or self._seen != self._pieces():
            self._pack()
        arenas = [arena for arena, _ in self._arenas if arena is not None]
        for arena in arenas:
            self._load(arena)
        factor = take = None
        if decide is not None:
            self._only_arenas("decide")
            factor, take = decide(sum((arena.squares() for arena in arenas[1:]), arenas[0].squares()))
        for i, group in enumerate(self.param_groups):
            options = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
            options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            both = {"factor": factor, "take": take} | ({} if self.ema_decay is None else {"ema_decay": self.ema_decay})
            if self._arenas[i][0] is not None and not self._arenas[i][0].step_(**options, **both):
                self._pack()  # a parameter has moved
                self._load(self._arenas[i][0])
                self._arenas[i][0].step_(**options, **both)
            self._step_by_torch(self._arenas[i][1], group, options)

    def _load(self, arena: Arena) -> None:
        if new := arena.load():
            for n in new:
                self.state[arena.params[n]] = arena.states[n]
            self._seen = self._pieces()

    def _pieces(self) -> list[int]:
        """What groups and state consist of; arenas keep all of it alive."""
        groups = chain.from_iterable(group["params"] for group in self.param_groups)
        return list(map(id, chain(groups, chain.from_iterable(map(dict.values, self.state.values())))))

    def packed(self) -> bool:
        """Whether parameters and state are still where the last step left them."""
        if self._arenas is None or self._seen != self._pieces():
            return False
        return all(arena is None or arena.intact() for arena, _ in self._arenas)

    def _pack(self) -> None:
        old = [arena for arena, _ in self._arenas or () if arena is not None]
        self._arenas = []
        owners = Counter(p.data_ptr() for group in self.param_groups for p in group["params"] if p.numel())
        for group in self.param_groups:
            own: list[Tensor] = []
            for p in group["params"]:
                by_torch = group["differentiable"] or (group["capturable"] and p.device.type == "cpu")
                shared = owners[p.data_ptr()] > 1  # by another parameter, from which moving would part it
                if not by_torch and not shared and fits(p, old) and p.device == (own or [p])[0].device:
                    own.append(p)
            inside = set(map(id, own))
            arena = Arena(own, [self.state.get(p) or {} for p in own], ema=self.ema_decay is not None) if own else None
            self._arenas.append((arena, [p for p in group["params"] if id(p) not in inside]))
        self._seen = self._pieces()
        if self.ema_decay is not None:
            self._only_arenas("ema_decay")

    def _only_arenas(self, what: str) -> None:
        for _, others in self._arenas:
            for p in others:
                raise RuntimeError(
                    f"FusedAdamax: {what} needs plain float32 parameters of one device with memory of their own, not "
                    f"{tuple(p.shape)} of {p.dtype} on {p.device}; call model.float(), or leave it out"
                )

    def _step_by_torch(self, params: list[Tensor], group: dict[str, Any], options: dict[str, Any]) -> None:
        params = [p for p in params if p.grad is not None]
        grads = [p.grad for p in params]
        if any(g.is_sparse for g in grads):  # which torch refuses in Adamax.step
            raise RuntimeError("Adamax does not support sparse gradients")
        for p in params:
            if not self.state[p]:
                dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
                self.state[p] |= {"step": torch.zeros((), dtype=dtype, device=p.device if group["capturable"] else "cpu"),
                                  "exp_avg": torch.zeros_like(p), "exp_inf": torch.zeros_like(p)}  # fmt: skip
        if params:
            state = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_inf", "step"))
            names = ("foreach", "capturable", "differentiable")
            adamax(params, grads, *state, **options, **{name: group[name] for name in names},
                   has_complex=any(map(torch.is_complex, params)))  # fmt: skip

    def ema_parameters(self) -> Iterator[Tensor]:
        """The average of every parameter, in the order of the groups; of one that has had no step yet, the parameter."""
        if self.ema_decay is None:
            raise RuntimeError("FusedAdamax averages no parameters: construct it with ema_decay=0.999, say")
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            yield self.state[p]["ema"] if self.state.get(p) else p.detach()

    @contextmanager
    def swapped_ema(self) -> Iterator[None]:
        """Inside, the parameters hold their averages, for evaluation and sampling. Statistics of batch norms stay."""
        averages = list(self.ema_parameters())
        params = [p for group in self.param_groups for p in group["params"]]
        _swap(params, averages)
        try:
            yield
        finally:
            _swap(params, averages)


@torch.no_grad()
def _swap(a: list[Tensor], b: list[Tensor]) -> None:
    held = [t.clone() for t in a]
    torch._foreach_copy_(a, b)
    torch._foreach_copy_(b, held)


def make_optimizer(model: NVAE, *, ema_decay: float | None = None) -> FusedAdamax:
    """Adamax over all parameters, as the configuration says."""
    c = model.config.training
    return FusedAdamax(model.parameters(), lr=c.learning_rate, betas=(0.9, 0.999), eps=c.adamax_eps,
                       weight_decay=c.weight_decay, foreach=True, ema_decay=ema_decay)  # fmt: skip
