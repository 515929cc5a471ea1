"""What every op refuses before it looks at a value: arguments of another type than its signature says."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nvae_fast.kernels._norm import Norm

F = TypeVar("F", bound=Callable[..., Any])

KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # what a signature says: the types that will do, and their name
    "Tensor": ((Tensor,), "a tensor"),
    "Norm": ((Norm,), "a Norm"),
    "int": ((int, torch.SymInt), "a whole number"),
    "float": ((float, int, torch.SymFloat, torch.SymInt), "a number"),
    "bool": ((bool,), "True or False"),
    "str": ((str,), "a word"),
    "Generator": ((torch.Generator,), "a torch.Generator"),
}
LISTS = list, tuple, nn.ParameterList
LARGEST = 2**31  # of whole numbers: beyond it the kernels' own overflow


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


def typed(function: F) -> F:
    """Decorates an op: TypeError or ValueError in one line, before it is called, for arguments that do not suit its
    annotations. What is right costs a microsecond or two."""
    rules = {name: rule(str(p.annotation)) for name, p in inspect.signature(function).parameters.items()}
    names = tuple(rules)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in zip(names, args, strict=False):
            check(name, value, rules[name])
        for name, value in kwargs.items():
            check(name, value, rules.get(name))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check(name: str, value: Any, wanted: Rule | None) -> None:
    """One argument. Errors as `typed` says."""
    if wanted is None or (value is None and wanted.absent):
        return
    if not wanted.many:
        check_one(name, value, wanted)
        return
    if not isinstance(value, LISTS):
        raise TypeError(f"{name} is {kind(value)}: expected a list, each entry {wanted.words}")
    for i, one in enumerate(value):
        if not (one is None and wanted.holes):
            check_one(f"{name}[{i}]", one, wanted)


def check_one(name: str, value: Any, wanted: Rule) -> None:
    if not isinstance(value, wanted.types) or (isinstance(value, bool) and bool not in wanted.types):
        none = " or None" if wanted.absent or wanted.holes else ""
        raise TypeError(f"{name} is {kind(value)}: expected {wanted.words}{none}")
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"{name} is a tensor of layout {value.layout}: expected a dense one; convert it with .to_dense()")
    elif isinstance(value, Norm):
        for field, part, of in zip(value._fields, value, FIELDS, strict=True):
            check(f"{name}.{field}", part, of)
    elif isinstance(value, int) and not -LARGEST < value < LARGEST:
        raise ValueError(f"{name} is out of range: expected a whole number of fewer than 32 bits")


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
