"""Which implementation of an op runs, and why.

An op registers the implementations it has beside its reference, the one that `auto` prefers first. Each comes with a
predicate that looks at the tensors of a call and answers None ("can run") or says in a few words why not.

* A named implementation never falls back: it runs, or `resolve_impl` raises and says why.
* `auto` takes the first registered implementation that can run, else the reference.
* `with use_impl("reference")` changes what `auto` takes and nothing else. An op that does not have the chosen
  implementation at all keeps its `auto` rule; an op that has it but cannot run it on this input raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")

Predicate = Callable[[Sequence[Tensor]], "str | None"]

_ops: dict[str, dict[str, Predicate]] = {}
_setting = "auto"


def register(op: str, **impls: Predicate) -> None:
    """Adds an op to the table; `impls` maps implementation to predicate, the fastest measured one first."""
    _ops[op] = impls


class use_impl:
    """Context manager: what `impl="auto"` means inside the block, read when an op's forward runs.

    A setting of the module, not of the thread. Backward always follows the implementation its forward took.
    """

    def __init__(self, name: str) -> None:
        _check_name(name)
        self.name = name
        self._previous: list[str] = []  # a stack: one object may be entered again inside itself

    def __enter__(self) -> use_impl:
        global _setting
        self._previous.append(_setting)
        _setting = self.name
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _setting
        _setting = self._previous.pop()


def resolve_impl(op: str, impl: str, *tensors: Tensor | None) -> str:
    """The implementation that this call of `op` runs. Raises ValueError for an unknown name, RuntimeError for a named
    implementation that cannot run on these tensors. `tensors` may contain None for absent arguments."""
    _check_name(impl)
    impls = _ops[op]
    if impl == "auto" and (_setting == "reference" or _setting in impls):
        impl = _setting
    given = [t for t in tensors if t is not None]
    inside = impl != "reference" and transformed()
    if inside and impl != "auto":
        raise RuntimeError(f"{op}: impl='{impl}' cannot run inside vmap, grad or jvp of torch.func; impl='reference' can")
    if impl == "auto" and not inside:
        for name, predicate in impls.items():
            reason = predicate(given)
            if reason is None:
                return name
            if reason == _native_reason():
                _say_once(reason)
        return "reference"
    if impl == "reference" or inside:
        return "reference"
    if impl not in impls:
        raise RuntimeError(f"{op} has no '{impl}' implementation: use impl='auto' or one of {', '.join(_names(op))}")
    reason = impls[impl](given)
    if reason is not None:
        raise RuntimeError(f"{op}: impl='{impl}' cannot run: {reason}; impl='auto' picks one that can")
    return impl


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is at work, which only the references understand."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def unless_chosen(op: str) -> str:
    """What `impl="auto"` becomes for a call for which the rule in the op's api.py prefers the reference: that, unless
    `use_impl` asks for another implementation that the op has."""
    return "auto" if _setting in _ops[op] else "reference"


def explain(op: str, *tensors: Tensor) -> dict[str, str | None]:
    """Every implementation of `op`, in the order of `auto`, with None ("can run") or why it cannot on these tensors."""
    return {name: predicate(tensors) for name, predicate in _ops[op].items()} | {"reference": None}


def table(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """One row per registered op: `op`, `auto` (what an input of this device and dtype would take), `not` (why not)."""
    probe = torch.empty(0, device=device, dtype=dtype)
    rows = []
    for op in sorted(_ops):
        reasons = explain(op, probe)
        taken = next(name for name, reason in reasons.items() if reason is None)
        rows.append({"op": op, "auto": taken, "not": {name: why for name, why in reasons.items() if why is not None}})
    return rows


def native_predicate(device: str, *dtypes: torch.dtype) -> Predicate:
    """Predicate of a compiled implementation: tensors on `device`, of one of `dtypes`, extension loaded."""

    def predicate(tensors: Sequence[Tensor]) -> str | None:
        for t in tensors:
            if t.device.type != device:
                return f"it takes {device} tensors, not {t.device.type}"
            if t.dtype not in dtypes:
                return f"it takes {' or '.join(map(_short, dtypes))}, not {_short(t.dtype)}"
            if t.device != tensors[0].device:
                return f"it takes tensors of one device, not of {tensors[0].device} and {t.device}"
        return _native_reason()

    return predicate


def without_gradient(can_run: Predicate) -> Predicate:
    """That of an implementation which cannot be differentiated."""

    def predicate(tensors: Sequence[Tensor]) -> str | None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "a tensor requires a gradient, which only the reference gives"
        return can_run(tensors)

    return predicate


@functools.cache
def load_native() -> tuple[ModuleType | None, str | None]:
    """The extension module nvae_fast._C, loaded on the first call, or None and the reason."""
    if importlib.util.find_spec("nvae_fast._C") is None:
        return None, "nvae_fast was installed without its native extension (reinstall where a C++ compiler is)"
    try:
        module = importlib.import_module("nvae_fast._C")
    except ImportError as error:
        return None, f"the native extension does not load ({str(error).splitlines()[0]}): reinstall nvae_fast"
    built = module.build_info()["torch"]
    if built != torch.__version__:
        return None, f"the native extension was built for torch {built}, this is {torch.__version__}: reinstall nvae_fast"
    return module, None


def _native_reason() -> str | None:
    return load_native()[1]


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"{reason}; until then ops run their PyTorch references", RuntimeWarning, stacklevel=4)


# torch.compile must not look inside: they import and warn, and what they return is a constant of the process. This is what
# torch.compiler.assume_constant_result does, which would import torch._dynamo along with this module.
for _function in (_native_reason, _say_once):
    vars(_function)["_dynamo_marked_constant"] = True


def _check_name(name: str) -> None:
    if name not in IMPLS:
        raise ValueError(f"unknown impl {name!r}: expected one of {', '.join(IMPLS)}")


def _names(op: str) -> list[str]:
    return [*_ops[op], "reference"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
