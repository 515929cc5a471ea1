"""The optimiser of NVAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nvae_fast.kernels.adamax import adamax_
from nvae_fast.kernels.adamax.reference import adamax_ as torch_adamax_
from nvae_fast.model import NVAE


class FusedAdamax(torch.optim.Adamax):
    """torch.optim.Adamax, with all float32 parameters of a group on the CPU stepped in one native call.

    Same arguments, defaults, param groups and state (`step`, `exp_avg`, `exp_inf`): state dicts go both ways. A step differs
    from torch's by rounding alone. Other parameters (float64, bfloat16, complex, CUDA, subclasses of Tensor), groups that are
    `capturable` or `differentiable`, and installations without native code take torch's own implementation; `foreach` says
    which one, and nothing where the native code runs.

    Formula, order of operations and source: `nvae_fast.kernels.adamax.adamax_`.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient. Returns what `closure`, which is called first, returns.

        Raises RuntimeError for sparse gradients, as torch.optim.Adamax does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = group["params"]
        grads = [grad for p in params if (grad := p.grad) is not None]
        if not grads:
            return
        if len(grads) < len(params):
            params = [p for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        if not all(states):
            _begin(params, states, group["capturable"])
        state = ([s[key] for s in states] for key in ("exp_avg", "exp_inf", "step"))
        names = ("lr", "eps", "weight_decay", "maximize", "foreach")
        options = {name: group[name] for name in names} | dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        if group["capturable"] or group["differentiable"]:
            both = {name: group[name] for name in ("capturable", "differentiable")}
            torch_adamax_(params, grads, *state, **options, **both)
        else:
            adamax_(params, grads, *state, **options)


def _begin(params: list[torch.Tensor], states: list[dict[str, torch.Tensor]], capturable: bool) -> None:
    """The state of parameters that had no step, as torch.optim.Adamax begins."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for p, state in zip(params, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if capturable else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_inf"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def make_optimizer(model: NVAE) -> FusedAdamax:
    """Adamax over all parameters, as the configuration says."""
    c = model.config.training
    return FusedAdamax(model.parameters(), lr=c.learning_rate, betas=(0.9, 0.999), eps=c.adamax_eps,
                       weight_decay=c.weight_decay, foreach=True)  # fmt: skip
