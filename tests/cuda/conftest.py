"""The CUDA kernels on CPU tensors: their source, unchanged, in the emulator, behind the schemas that impl="cuda" calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import pytest
import torch
from emulated import Library, build, compiler
from norms import NATIVE, Call, copied, outcome, shuffled
from torch import Tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _impl
from nvae_fast.kernels.depthwise_conv.ops import counted

DRAWS = 2  # a single draw of the plain op's error says little where a result has few elements


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Library:
    if shutil.which(compiler()) is None:
        pytest.skip("there is no C++ compiler")
    return Library(build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def cuda_on_cpu(library, monkeypatch) -> Library:
    """impl="cuda" runs on CPU tensors, in the emulator."""
    if NATIVE is None:
        pytest.skip("nvae_fast was installed without its native extension, which does the normalisation's tables here")
    stats, affine_ = torch.ops.nvae_fast.bn_act_stats, torch.ops.nvae_fast.bn_act_affine_  # which know no float16 on the CPU

    def affine_of_any_type(du: Tensor, x: Tensor, c: Tensor, also: Tensor | None = None) -> None:
        wide = du.float()
        affine_(wide, x.float(), c, None if also is None else also.float())
        du.copy_(wide)

    monkeypatch.setattr(torch.ops.nvae_fast, "bn_act_stats", lambda x, *following: stats(x.float(), *following))
    monkeypatch.setattr(torch.ops.nvae_fast, "bn_act_affine_", affine_of_any_type)
    monkeypatch.setitem(_impl._ops, "depthwise_conv", {"cuda": lambda tensors: None})
    for name in ("depthwise_conv_cuda_fwd", "depthwise_conv_cuda_bwd"):
        monkeypatch.setattr(torch.ops.nvae_fast, name, counted(name))
        monkeypatch.setattr(torch.ops.nvae_fast, f"{name}_counted", getattr(library, name))
    library.ran.clear()
    return library


@pytest.fixture
def check(cuda_on_cpu, within_budget) -> Callable[..., None]:
    """check(call, tensors, norms, dtype): impl="cuda" is within the budget, outputs and all gradients."""

    def check(call: Call, tensors: Sequence[Tensor], norms: Sequence[F.Norm], dtype: torch.dtype, plain_dtype=None) -> None:
        found: dict[str, list[dict[str, Tensor]]] = {"exact": [], "plain": [], "got": []}
        for draw in range(DRAWS):
            drawn = [shuffled(t, draw) for t in tensors]
            wide = [t.double() for t in drawn], [copied(n, torch.float64) for n in norms]
            found["exact"].append(outcome(call, *wide, "reference"))
            stored = [t.to(dtype) for t in drawn]
            # PyTorch's weight gradient of a dilated bfloat16 convolution may hold memory that nobody wrote
            plain = outcome(call, [t.to(plain_dtype or dtype) for t in stored], norms, "reference")
            found["plain"].append(
                {name: t.to(dtype) if name[0] in "yd" and name[1:].isdigit() else t for name, t in plain.items()}
            )
            found["got"].append(outcome(call, stored, norms, "cuda"))
        pooled = {who: {name: torch.stack([d[name] for d in draws]) for name in draws[0]} for who, draws in found.items()}
        for name, truth in pooled["exact"].items():
            try:
                if name.startswith("count"):
                    assert torch.equal(pooled["got"][name], truth)
                else:
                    own = max(len(norms), 1) * truth.abs().max().item()
                    within_budget(pooled["got"][name], pooled["plain"][name], truth, dtype, own)
            except AssertionError as problem:
                raise AssertionError(f"{name}: {problem}") from None

    return check
