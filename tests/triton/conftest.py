"""Triton's kernels on CPU tensors, in its interpreter: the public ops run with the launchers behind their schemas."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no conftest does

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import pytest
import torch
from norms import Call, copied, outcome, shuffled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nvae_fast import functional as F
from nvae_fast.kernels import _impl, _triton

DRAWS = 2  # a single draw of the plain op's error says little where a result has few elements

OPS = {
    "adamax": ["adamax_flat_squares", "adamax_flat_step_"],
    "conv2d": ["conv2d_fwd", "conv2d_bwd"],
    "bn_act": [f"bn_act_{name}" for name in ("stats", "coefficients", "gradients", "fwd", "sums", "bwd", "affine_")],
    "depthwise_conv": ["depthwise_conv_fwd", "depthwise_conv_bwd", "depthwise_conv_bwd_"],
    "inverted_residual": [],
    "flow_cell": ["flow_cell_fwd", "flow_cell_bwd"],
    "pointwise_conv": ["pointwise_conv_fwd", "pointwise_conv_bwd"],
    "power_iteration": ["power_iteration_fwd", "power_iteration_bwd"],
    "se_residual": [f"se_residual_{name}" for name in ("fwd", "bwd", "dy_", "dx")],
    "residual_normal": [
        "residual_normal_fwd",
        "residual_normal_bwd",
        "normal_log_prob_fwd",
        "normal_log_prob_bwd",
        "normal_sample_fwd",
    ],
    "normal_log_prob": [],
    "normal_sample": [],
    "logistic_mixture_log_prob": [f"logistic_mixture_{name}" for name in ("log_prob_fwd", "log_prob_bwd", "sample_fwd")],
    "logistic_mixture_sample": [],
    "shared_weights": ["shared_weights_fwd", "shared_weights_bwd"],
    "weight_norm": ["weight_norm_fwd", "weight_norm_bwd"],
}


@pytest.fixture(scope="session", autouse=True)
def old_and_new_interpreters() -> Iterator[None]:
    """Those of Triton 3.6, with a NumPy that makes no number of an array [1], and of 3.9, which takes masks of bool alone but
    makes int32 of a scalar condition that it broadcasts."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    mend, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def mended(tensor: type, scope: object) -> None:
        mend(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def of_bools(mask: object) -> object:
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    def load_where(self, at, mask, *rest):
        return load(self, at, of_bools(mask), *rest)

    def store_where(self, at, value, mask, *rest):
        return store(self, at, value, of_bools(mask), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", mended)
        patch.setattr(builder, "create_masked_load", load_where)
        patch.setattr(builder, "create_masked_store", store_where)
        yield


@pytest.fixture
def triton_on_cpu(monkeypatch) -> None:
    """impl="triton" runs on CPU tensors, which nothing but the interpreter can do."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'triton>=3.6'")
    for op, names in OPS.items():
        monkeypatch.setitem(_impl._ops, op, {"triton": lambda tensors: None})
        for name in names:
            launchers = importlib.import_module(f"nvae_fast.kernels.{op.removesuffix('_log_prob')}.triton")
            monkeypatch.setattr(torch.ops.nvae_fast, name, getattr(launchers, name))


@pytest.fixture
def check(triton_on_cpu, within_budget) -> Callable[..., None]:
    """check(call, tensors, norms, dtype, images): impl="triton" is within the budget, outputs and all gradients. The first
    `images` tensors are stored in `dtype`."""

    def check(call: Call, tensors: Sequence[Tensor], norms: Sequence[F.Norm], dtype: torch.dtype, images: int) -> None:
        found: dict[str, list[dict[str, Tensor]]] = {"exact": [], "plain": [], "got": []}
        for draw in range(DRAWS):
            drawn = [shuffled(t, draw) for t in tensors]
            wide = [t.double() for t in drawn], [copied(n, torch.float64) for n in norms]
            found["exact"].append(outcome(call, *wide, "reference"))
            stored = [t.to(dtype) if i < images else t for i, t in enumerate(drawn)]
            found["plain"].append(outcome(call, stored, norms, "reference"))
            found["got"].append(outcome(call, stored, norms, "triton"))
        pooled = {who: {name: torch.stack([d[name] for d in draws]) for name in draws[0]} for who, draws in found.items()}
        largest = max(t.abs().max().item() for name, t in pooled["exact"].items() if name.startswith("d"))
        for name, truth in pooled["exact"].items():
            try:
                if name.startswith("count"):
                    assert torch.equal(pooled["got"][name], truth)
                else:
                    own = truth.abs().max().item()
                    zero = own < 1e-9 * largest  # 0 but for rounding
                    yardstick = largest if zero else max(len(norms), 1) * own  # each norm folds scale and shift: one rounding
                    within_budget(pooled["got"][name], pooled["plain"][name], truth, dtype, yardstick)
            except AssertionError as problem:
                raise AssertionError(f"{name}: {problem}") from None

    return check


@pytest.fixture
def shuffle(triton_on_cpu, monkeypatch) -> Callable[[Callable[[int], Sequence[int]]], None]:
    """shuffle(order): the programs of a launch along its first axis run as order(how many) lists them."""
    from triton.runtime.interpreter import interpreter_builder

    run = interpreter_builder.set_grid_idx

    def shuffle(order: Callable[[int], Sequence[int]]) -> None:
        orders = cache(order)
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda x, y, z: run(orders(interpreter_builder.grid_dim[0])[x], y, z)
        )

    return shuffle


QUIET = {"detach", "alias", "view", "_unsafe_view", "as_strided", "select", "slice", "expand", "t", "transpose", "permute",
         "unbind", "unsqueeze", "split", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
         "promote_types"}  # fmt: skip


class _Torch(TorchDispatchMode):
    """Notes what torch would launch on a GPU: its operations but for views and allocations."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in QUIET:
            self.found.append(f"torch.{name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(triton_on_cpu, monkeypatch) -> Callable[[], AbstractContextManager[list[str]]]:
    """`with launches() as names:` lists what a GPU would be asked to run, in order: Triton's kernels and torch's own."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    @contextmanager
    def listed() -> Iterator[list[str]]:
        found: list[str] = []

        def noted(executor, *args, **kwargs):
            found.append(executor.fn.__name__)
            with _disable_current_modes():  # what the interpreter itself does with tensors
                return run(executor, *args, **kwargs)

        _triton.tickets(torch.device("cpu"), 1)  # made by the first launch of a stream
        with monkeypatch.context() as patch, _Torch(found):
            patch.setattr(GridExecutor, "__call__", noted)
            yield found

    return listed
