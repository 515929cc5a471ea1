"""Which module the first NaN or infinity of a training step comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvae_fast.model import NVAE
from nvae_fast.regularization import SpectralState
from nvae_fast.training.state import random_state, set_random_state
from nvae_fast.training.step import PRECISIONS


class Finding(NamedTuple):
    """Where the first non-finite value of a step is, and what is known about it."""

    where: str
    what: str


def diagnose(model: NVAE, x: Tensor, *, kl_coeff: float, norm_coeff: float, spectral: SpectralState | None = None,
             precision: str = "fp32", random: dict[str, Tensor] | None = None) -> Finding | None:  # fmt: skip
    """The first non-finite value of forward and backward on the batch x [B, C, H, W]; None when all is finite.

    Looks at the batch, parameters and buffers, then at every module in the order of the forward pass, the terms of the loss,
    and the gradients in the order of the backward pass. `random` is the random state that the step began with (None: the
    present one). Model, gradients, singular vectors and random state are left as they are. With batch norms that are joined
    over processes, all processes call it.
    """
    device = x.device
    kept = {name: b.clone() for name, b in model.named_buffers()}
    now, training = random_state(device), model.training
    copy = SpectralState()
    if spectral is not None:
        copy.load_state_dict(spectral.state_dict())
    set_random_state(random or now, device)
    try:
        with _Probe(model.train()).watching() as probe:
            probe.standing(x)
            with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
                terms = model.loss(x, kl_coeff=kl_coeff, spectral_coeff=norm_coeff, spectral=copy)
            probe.terms(terms)
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(terms["total"], list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    probe.see(f"the gradient of {name}", grad, "it")
            return probe.finding
    finally:
        model.train(training)
        set_random_state(now, device)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(kept[name])


class _Probe:
    """Looks at tensors as they come and keeps the first finding."""

    def __init__(self, model: NVAE) -> None:
        self.model, self.finding = model, None
        self._consumer: dict[int, tuple[str, str, str]] = {}
        self._alive: list[Tensor] = []  # so that no two tensors share an id

    def see(self, where: str, tensor: Tensor, subject: str, more: str = "") -> bool:
        """Whether all values are finite; the first time that they are not becomes the finding."""
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            return True
        if self.finding is None:
            nan, size = int(tensor.isnan().sum()), tensor.numel()
            infinite = size - nan - int(tensor.isfinite().sum())
            self.finding = Finding(where, f"{subject} holds {nan} NaN and {infinite} infinite of {size} values{more}")
        return False

    def standing(self, x: Tensor) -> None:
        """What the step starts from."""
        self.see("the batch", x, "it")
        for kind, tensors in (("parameter", self.model.named_parameters()), ("buffer", self.model.named_buffers())):
            for name, tensor in tensors:
                self.see(f"the {kind} {name}", tensor, "it")

    def terms(self, terms: dict[str, Tensor]) -> None:
        """What follows the last module: KL by group, then the likelihood, the regularisers and their sum."""
        for i, kl in enumerate(terms["kl_all"]):
            self.see(f"the KL of latent group {i}", kl, "it", f"; the logits range {span([terms['logits']])}")
        for name in ("recon", "spectral", "bn", "total"):
            self.see(f"the loss term {name}", terms[name], "it", f"; the logits range {span([terms['logits']])}")

    @contextmanager
    def watching(self) -> Iterator[_Probe]:
        """Hooks on every module inside the block."""
        hooks = [
            module.register_forward_hook(lambda _, given, out, module=module, name=name: self._passed(name, module, given, out))
            for name, module in self.model.named_modules()
            if name
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _passed(self, name: str, module: nn.Module, given: Any, out: Any) -> None:
        label, inputs, outputs = f"{name} ({type(module).__name__})", list(tensors_of(given)), list(tensors_of(out))
        for tensor in inputs:
            self.see(f"what leads to {label}", tensor, "its input")
        weights = list(module.parameters())
        facts = f"; its input ranges {span(inputs)}" + (f", its parameters {span(weights)}" if weights else "")
        for tensor in outputs:
            self.see(label, tensor, "its output", facts)
        for tensor in inputs:
            self._follow(tensor, f"the backward of {label}", "the gradient of its input", facts)
        for tensor in outputs:
            self._follow(tensor, f"what follows {label}", "the gradient of its output", f"; it ranges {span(outputs)}")

    def _follow(self, tensor: Tensor, where: str, subject: str, facts: str) -> None:
        """Look at the gradient of a tensor when it comes; the first to consume the tensor names it, else who made it."""
        if not tensor.requires_grad:
            return
        known = id(tensor) in self._consumer
        if known and not (where.startswith("the backward") and self._consumer[id(tensor)][0].startswith("what follows")):
            return
        self._consumer[id(tensor)] = (where, subject, facts)
        if not known:
            self._alive.append(tensor)
            key = id(tensor)

            def arrived(grad: Tensor) -> None:
                where, subject, facts = self._consumer[key]
                self.see(where, grad, subject, facts)

            tensor.register_hook(arrived)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def span(tensors: Iterable[Tensor]) -> str:
    """ "from -1.5 to 2": the finite values of some tensors."""
    values = [t.detach()[t.detach().isfinite()] for t in tensors if t.is_floating_point()]
    values = [v.float() for v in values if v.numel()]
    if not values:
        return "over nothing finite"
    return f"from {min(float(v.min()) for v in values):.3g} to {max(float(v.max()) for v in values):.3g}"
