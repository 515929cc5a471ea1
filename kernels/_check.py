"""What every op refuses before it looks at a value: arguments of another type than its signature says."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from nvae_fast.kernels._norm import Norm

F = TypeVar("F", bound=Callable[..., Any])

TENSOR, NORM = (Tensor,), (Norm,)
WHOLE, NUMBER = (int, torch.SymInt), (float, int, torch.SymFloat, torch.SymInt)
KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # what a signature says: the types that will do, and their name
    "Tensor": (TENSOR, "a tensor"),
    "Norm": (NORM, "a Norm"),
    "int": (WHOLE, "a whole number"),
    "float": (NUMBER, "a number"),
    "bool": ((bool,), "True or False"),
    "str": ((str,), "a word"),
    "Generator": ((torch.Generator,), "a torch.Generator"),
}
LISTS = list, tuple, nn.ParameterList
LARGEST = 2**63  # of whole numbers: what 64 bits hold


class Rule(NamedTuple):
    types: tuple[type, ...]
    words: str
    absent: bool  # None will do
    many: bool  # a list of such
    holes: bool  # in which None will do


def rule(annotation: str) -> Rule | None:
    """That of an annotation such as "Tensor | None" or "Sequence[Norm]"; None where it says nothing that KINDS knows."""
    annotation = annotation.replace("tuple[Tensor, Tensor]", "Sequence[Tensor]")
    found = re.fullmatch(r"(Sequence\[)?(?:_norm\.|torch\.)?(\w+)( \| None)?\]?( \| None)?", annotation)
    if found is None or found[2] not in KINDS:
        return None
    types, words = KINDS[found[2]]
    return Rule(types, words, bool(found[4] or (found[3] and not found[1])), bool(found[1]), bool(found[1] and found[3]))


FIELDS = tuple(rule(getattr(a, "__forward_arg__", str(a))) for a in Norm.__annotations__.values())
PLAIN = tuple(frozenset((*r.types, *((nn.Parameter, type(None)) if r.absent else ())) if r else (type(None),)) for r in FIELDS)


def typed(function: F) -> F:
    """Decorates an op: TypeError or ValueError in one line, before it is called, for arguments that do not suit its
    annotations. What is right costs a few microseconds: only what is wrong is looked at closely."""
    rules = {name: rule(str(p.annotation)) for name, p in inspect.signature(function).parameters.items()}
    names = tuple(rules)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in zip(names, args, strict=False):
            if not suits(value, rules[name]):
                raise refusal(name, value, rules[name])
        for name, value in kwargs.items():
            if not suits(value, rules.get(name)):
                raise refusal(name, value, rules[name])
        return function(*args, **kwargs)

    return cast(F, checked)


def suits(value: Any, wanted: Rule | None) -> bool:
    """Whether an argument is of the type that is wanted."""
    if wanted is None or (value is None and wanted.absent):
        return True
    if wanted.many:
        return isinstance(value, LISTS) and all([suits_one(v, wanted) or (v is None and wanted.holes) for v in value])
    return suits_one(value, wanted)


def suits_one(value: Any, wanted: Rule) -> bool:
    types = wanted.types
    if not isinstance(value, types):
        return False
    if types is TENSOR:
        return value.layout is torch.strided
    if types is NORM:
        plain = all([type(v) in p for v, p in zip(value, PLAIN, strict=True)])  # what it nearly always is, seen quickly
        return plain or all([suits(v, r) for v, r in zip(value, FIELDS, strict=True)])
    if types is WHOLE:
        return value is not True and value is not False and -LARGEST < value < LARGEST
    return types is not NUMBER or (value is not True and value is not False)


def refusal(name: str, value: Any, wanted: Rule) -> Exception:
    """What to raise for an argument that does not suit."""
    none = " or None" if wanted.absent or wanted.holes else ""
    if wanted.many:
        if not isinstance(value, LISTS):
            return TypeError(f"{name} is {kind(value)}: expected a list, each entry {wanted.words}")
        i = next(i for i, v in enumerate(value) if not (suits_one(v, wanted) or (v is None and wanted.holes)))
        name, value, none = f"{name}[{i}]", value[i], " or None" if wanted.holes else ""
    if isinstance(value, Norm) and wanted.types is NORM:
        found = zip(value._fields, value, FIELDS, strict=True)
        return next(refusal(f"{name}.{field}", v, r) for field, v, r in found if r is not None and not suits(v, r))
    if isinstance(value, Tensor) and wanted.types is TENSOR:
        return TypeError(f"{name} is a tensor of layout {value.layout}: expected a dense one; convert it with .to_dense()")
    if isinstance(value, int) and not isinstance(value, bool) and int in wanted.types:
        return ValueError(f"{name} is out of range: expected a whole number of at most 64 bits")
    return TypeError(f"{name} is {kind(value)}: expected {wanted.words}{none}")


def kind(value: Any) -> str:
    """A value in a few characters, with its type."""
    if value is None:
        return "None"
    shown = f" {value!r}" if isinstance(value, (bool, int, float, str)) else ""
    return f"{type(value).__name__}{shown[:40]}"


def least(**numbers: float) -> None:
    """ValueError for numbers below 0, or NaN."""
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}: expected a number >= 0")
