"""When impl="cuda" can run, and why not otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nvae_fast.kernels import _auto, _impl, _triton
from nvae_fast.kernels.depthwise_conv import depthwise_conv, ops


def on_cuda(dtype: torch.dtype, *shape: int) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=torch.Size(shape))


@pytest.fixture
def built(monkeypatch):
    """As where the extension was built with CUDA and the GPU is modern."""
    monkeypatch.setattr(_impl, "_native_reason", lambda: None)
    monkeypatch.setattr(ops, "_no_cuda_code", lambda: None)
    monkeypatch.setattr(_triton, "_too_old", lambda index: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_it_for_cuda_tensors_and_for_no_others(built, dtype):
    x, weight = on_cuda(dtype, 2, 8, 4, 4), on_cuda(dtype, 8, 1, 5, 5)
    assert _impl.resolve_impl("depthwise_conv", "auto", x, weight) == "cuda"
    assert _impl.resolve_impl("depthwise_conv", "auto", torch.ones(1, dtype=dtype)) != "cuda"
    with pytest.raises(
        RuntimeError, match="impl='cuda' cannot run: it takes cuda tensors, not cpu; impl='auto' picks one that can"
    ):
        depthwise_conv(torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3), impl="cuda")


def test_the_table_of_reasons_is_what_auto_does(built, monkeypatch):
    monkeypatch.setattr(_triton, "_missing", lambda: None)
    x, weight = on_cuda(torch.float32, 2, 8, 4, 4), on_cuda(torch.float32, 8, 1, 5, 5)
    taken = {op: _impl.resolve_impl(op, "auto", x, weight) for op, impls in _impl._ops.items() if "cuda" in impls}
    assert taken == dict.fromkeys(_auto.CUDA, "cuda")
    assert all("predicted, not measured" in rule.why for rule in _auto.CUDA.values())
    monkeypatch.setattr(ops, "_no_cuda_code", lambda: "no CUDA")
    assert all(_impl.resolve_impl(op, "auto", x, weight) == "triton" for op in _auto.CUDA)


def test_why_not(built, monkeypatch):
    why = lambda *tensors: _impl.explain("depthwise_conv", *tensors)["cuda"]  # noqa: E731
    x, weight = on_cuda(torch.float32, 2, 8, 4, 4), on_cuda(torch.float32, 8, 1, 29, 29)
    assert why(x, weight) == "it takes kernels up to 27, not 29"
    assert "float16, not float64" in why(on_cuda(torch.float64, 1))
    monkeypatch.setattr(_triton, "_too_old", lambda index: "it needs compute capability 8.0, this GPU has 7.0")
    assert why(x) == "it needs compute capability 8.0, this GPU has 7.0"
    monkeypatch.setattr(ops, "_no_cuda_code", lambda: "no CUDA")
    assert why(x) == "no CUDA"


def test_a_build_without_cuda_says_so():
    native = _impl.load_native()[0]
    if native is None or native.build_info()["cuda"]:
        pytest.skip("needs a native extension built without CUDA")
    assert "built without CUDA (reinstall with NVAE_FAST_BUILD=cuda" in ops._no_cuda_code()


def test_the_schemas_know_shapes_without_a_gpu():
    x, weight = torch.empty(2, 8, 7, 5, device="meta"), torch.empty(8, 1, 3, 3, device="meta")
    raw = torch.ops.nvae_fast
    for name in ("depthwise_conv", "depthwise_conv_cuda"):
        y, stats = getattr(raw, f"{name}_fwd")(x, None, 0, weight, 2, 1, 1, True)
        du, dweight, sums = getattr(raw, f"{name}_bwd")(y, None, None, x, None, 0, weight, 2, 1, 1)
        assert y.shape == (2, 8, 4, 3) and stats.shape == (2, 8) and du.shape == x.shape
        assert dweight.shape == weight.shape and sums.shape == (0, 8) and y.is_contiguous(memory_format=torch.channels_last)
    assert raw.depthwise_conv_cuda_fwd(x, None, 0, weight, 1, 1, 2, False, variant=1)[0].shape == (2, 8, 14, 10)
