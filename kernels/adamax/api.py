"""adamax: one step of Adamax on all parameters of an arena, in place.

`impl="auto"` takes "cpu" for an arena on the CPU (measured: README.md beside this file), "triton" for one on CUDA, else the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _impl, _lists, _triton
from nvae_fast.kernels.adamax import ops, reference
from nvae_fast.kernels.adamax.reference import ROW

_impl.register("adamax", cpu=ops.cpu_can_run, triton=_triton.can_run)
_triton.register("adamax", "adamax_flat_squares", "adamax_flat_step_")

PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types of tensors whose memory is what it seems; a subclass (DTensor, say) has its own idea of an operation."""

State = dict[str, Any]


class Arena:
    """Float32 parameters of one device, one after the other in one buffer, with their state in others of the same layout.

    Per parameter that has a gradient, with its number of steps t counted from 1:

        t <- t + 1,  g = factor grad (-factor grad to maximise) + weight_decay param
        exp_avg <- beta1 exp_avg + (1 - beta1) g,  exp_inf <- max(beta2 exp_inf, |g| + eps)
        param <- param - lr / (1 - beta1^t) exp_avg / exp_inf
        ema <- ema_decay ema + (1 - ema_decay) param

    Args:
        params: tensors that `fits` accepts. Their data moves into the buffer; shapes and strides stay.
        states: a dictionary each. What it holds (`exp_avg`, `exp_inf`, `step` and perhaps `ema`) moves into the buffers; it is
            empty until the first gradient comes, and filled then.
        ema: keep averaged parameters, which begin as the parameters.

    Gradients stay where autograd leaves them: accumulating into a buffer costs a pass over it and a call for each.

    Source: Kingma and Ba, arXiv 1412.6980, section 7.1, with eps as torch.optim.Adamax has it.
    """

    def __init__(self, params: Sequence[Tensor], states: Sequence[State], *, ema: bool = False) -> None:
        self.params, self.states = list(params), list(states)
        device = params[0].device
        begins, records, offsets, end = [], [], [], 0
        for p in params:
            offsets.append(len(params) + len(records))
            begins.append(end)
            records += [end, p.dim(), *p.shape, *p.stride()]
            end += -(-p.numel() // ROW) * ROW
        self.layout = torch.tensor(offsets + records)
        self.param, self.exp_avg, self.exp_inf = (torch.zeros(end, dtype=torch.float32, device=device) for _ in range(3))
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=device)
        self._begins = begins
        self._places = [self._place(self.param, i) for i in range(len(params))]
        with torch.no_grad():
            for p, place in zip(params, self._places, strict=True):
                place.copy_(p)
                p.data = place
        self.ema = self.param.clone() if ema else None
        self._pointers, self._strides = [p.data_ptr() for p in params], [p.stride() for p in params]
        self._active: dict[tuple[int, ...], Tensor] = {}
        self._rows: Tensor | None = None  # and what gradients are gathered into, where the implementation wants them so
        self._grad: Tensor | None = None
        self._table: Tensor | None = None
        for i, state in enumerate(states):
            if state:
                self._begin(i)

    def _place(self, flat: Tensor, i: int) -> Tensor:
        """The part of a buffer that is parameter i's."""
        return placed(flat, self._begins[i], self.params[i].shape, self.params[i].stride())

    @torch.no_grad()
    def _begin(self, i: int) -> None:
        state = self.states[i]
        flats = {"exp_avg": self.exp_avg, "exp_inf": self.exp_inf} | ({} if self.ema is None else {"ema": self.ema})
        places = {name: self._place(flat, i) for name, flat in flats.items()}
        for name, place in places.items():
            if name in state:
                if state[name].shape != place.shape:
                    raise RuntimeError(
                        f"adamax: {name} of shape {tuple(state[name].shape)} for a parameter of shape {tuple(place.shape)}; "
                        "load the state of the same model"
                    )
                place.copy_(state[name])
        places["step"] = placed(self.steps, i, (), ())
        if "step" in state:
            places["step"].copy_(torch.as_tensor(state["step"]))
        state.update(places)

    def owns(self, p: Tensor) -> bool:
        """Whether the memory of p is a view of this arena's, which happens without native code."""
        return p.untyped_storage().data_ptr() == self.param.untyped_storage().data_ptr()

    def intact(self) -> bool:
        """Whether all parameters are where they were put."""
        params = self.params
        return [p.data_ptr() for p in params] == self._pointers and [p.stride() for p in params] == self._strides

    def load(self) -> list[int]:
        """Take up the gradients that there are now, for `squares` and `step_`; the numbers of the parameters whose state begins
        with them. At most one `step_` follows.

        Raises RuntimeError for gradients that do not fit.
        """
        grads = [p.grad for p in self.params]
        self._numbers = [i for i, g in enumerate(grads) if g is not None]
        self._grads = grads if len(self._numbers) == len(grads) else [grads[i] for i in self._numbers]
        self._impl = _impl.resolve_impl("adamax", "auto", self.param)
        if self._impl != "cpu" and self._numbers:
            self._prepare()
        new = [i for i in self._numbers if not self.states[i]]
        for i in new:
            self._begin(i)
        return new

    def _prepare(self) -> None:
        """Gradients as the implementation wants them: by a table, where they are, for Triton, gathered for the reference."""
        if any(g.is_sparse for g in self._grads):
            raise RuntimeError("Adamax does not support sparse gradients")
        if self._grad is None:
            self._grad = torch.zeros_like(self.param)
            self._views = [self._place(self._grad, i) for i in range(len(self.params))]
            sizes = torch.tensor(self._begins + [len(self.param)]).diff() // ROW
            self._rows = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes).to(self.param.device)
        key = tuple(self._numbers)
        if key not in self._active:
            active = torch.zeros(len(self.params), dtype=torch.bool)
            active[self._numbers] = True
            self._active[key] = active.to(self.param.device)
        if self._impl == "reference":
            if len(key) < len(self.params):
                self._grad.zero_()
            torch._foreach_copy_([self._views[i] for i in key], self._grads)
        else:
            self._table = self._tabled()

    def _tabled(self) -> Tensor:
        """int64 [P, 2]: of each gradient, the address that element 0 of the arena would have, and where it ends
        (0, 0 where there is none). Gradients that cannot be read as rows of the arena, 16 bytes at a time, are copied first."""
        misfits, table = [], [(0, 0)] * len(self.params)
        for i, g in zip(self._numbers, self._grads, strict=True):
            n = g.numel()
            if not (n % 4 == 0 and g.data_ptr() % 16 == 0 and g.dtype == torch.float32
                    and (g.stride() == self._strides[i] or same_order(g, self._strides[i]))):  # fmt: skip
                misfits.append((self._views[i], g))
                g, n = self._views[i], -(-n // ROW) * ROW
            table[i] = g.data_ptr() - 4 * self._begins[i], self._begins[i] + n
        if misfits:
            torch._foreach_copy_(*map(list, zip(*misfits, strict=True)))
        return _lists.upload(_lists.numbers(table), self.param.device)

    def squares(self) -> Tensor:
        """The sum of the squares of all loaded gradients, a float64 scalar: finite just where all of them are."""
        if not self._numbers:
            return torch.zeros((), dtype=torch.float64, device=self.param.device)
        if self._impl == "cpu":
            return torch.ops.nvae_fast.adamax_squares(self._grads)
        if self._impl == "reference":
            return reference.flat_squares(self._grad)
        return torch.ops.nvae_fast.adamax_flat_squares(self.param, self._table, self._rows)

    def step_(
        self,
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float = 0.0,
        maximize: bool = False,
        ema_decay: float = 1.0,
        factor: Tensor | None = None,
        take: Tensor | None = None,
    ) -> bool:
        """One step with the loaded gradients. False, and nothing is written, if a parameter is not where it was put.

        Args:
            lr: a number, or a scalar on the arena's device, which is not waited for.
            beta1, beta2, eps, weight_decay, maximize: as in torch.optim.Adamax.
            ema_decay: that of the averaged parameters.
            factor: float32 scalar that multiplies the gradients (None: 1).
            take: bool scalar; where it is false nothing is written (None: true).
        """
        if not self._numbers:
            return True
        numbers = (beta1, beta2, eps, weight_decay, maximize, ema_decay)
        state = (self.param, self.exp_avg, self.exp_inf, self.ema, self.steps)
        if self._impl == "cpu":
            params = self.params if len(self._numbers) == len(self.params) else [self.params[i] for i in self._numbers]
            return torch.ops.nvae_fast.adamax_step_(
                params, self._grads, self._numbers, self.layout, *state, factor, take, float(lr), *numbers
            )
        if not self.intact():
            return False
        rate = (
            torch.full((), lr, dtype=torch.float64, device=self.param.device)
            if isinstance(lr, (int, float))
            else lr.to(self.param.device, torch.float64)
        )
        param, *others = state
        step_, grads = torch.ops.nvae_fast.adamax_flat_step_, self._table
        if self._impl == "reference":
            step_, grads = reference.flat_step_, self._grad
        step_(param, grads, *others, self._rows, self._active[tuple(self._numbers)], rate, factor, take, *numbers)
        torch.autograd.graph.increment_version(self.params)  # what torch's in-place operations tell autograd
        return True


def placed(flat: Tensor, begin: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A part of a buffer. It has a storage of its own, so that saving it does not save the whole buffer; without native code it
    is a view."""
    if _impl.load_native()[0] is None:
        return flat.as_strided(size, stride, begin)
    return torch.ops.nvae_fast.adamax_place(flat, begin, size, stride)


def same_order(t: Tensor, strides: Sequence[int]) -> bool:
    """Whether elements of t are where they would be with these strides."""
    return all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True))


def fits(p: Tensor, arenas: Sequence[Arena] = ()) -> bool:
    """Whether an arena can take p: plain, float32, on the CPU or CUDA, dense in any order of axes, and alone in its storage or
    a part of one of `arenas` (moving a view of other memory would part it from its base)."""
    if type(p) not in PLAIN or p.dtype != torch.float32 or p.layout != torch.strided or p.device.type not in ("cpu", "cuda"):
        return False
    reach = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1 and p.numel():
            if stride != reach:
                return False
            reach *= size
    return p.untyped_storage().nbytes() == 4 * p.numel() or any(arena.owns(p) for arena in arenas)
