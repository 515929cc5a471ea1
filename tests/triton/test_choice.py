"""When impl="triton" can run, why not otherwise, and that nothing imports triton before it is needed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nvae_fast import functional as F
from nvae_fast.kernels import _impl, _triton


def on_cuda(dtype: torch.dtype, requires_grad: bool = False, index: int = 0) -> SimpleNamespace:
    shape = torch.Size((8, 1, 5, 5))
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, requires_grad=requires_grad, shape=shape)


@pytest.fixture
def modern_gpu(monkeypatch):
    monkeypatch.setattr(_triton, "_missing", lambda: None)
    monkeypatch.setattr(_triton, "_too_old", lambda index: None)


@pytest.mark.parametrize("dtype", _triton.DTYPES)
@pytest.mark.parametrize(
    "op",
    [
        *("bn_act", "conv2d", "depthwise_conv", "inverted_residual", "pointwise_conv", "se_residual"),
        *("residual_normal", "logistic_mixture_log_prob", "flow_cell", "power_iteration", "weight_norm"),
    ],
)
def test_auto_takes_it_for_cuda_tensors_and_for_no_others(modern_gpu, op, dtype):
    x = on_cuda(dtype)
    assert _impl.resolve_impl(op, "auto", x, x) == "triton" == _impl.resolve_impl(op, "triton", x)
    assert _impl.resolve_impl(op, "auto", torch.ones(1, dtype=dtype)) != "triton"
    with pytest.raises(RuntimeError, match=f"{op}: impl='triton' cannot run: it takes cuda tensors, not cpu; impl='auto' .*"):
        _impl.resolve_impl(op, "triton", torch.ones(1, dtype=dtype))


def test_other_types_and_machines_are_refused_with_the_reason(modern_gpu, monkeypatch):
    reason = "it takes float32, bfloat16 or float16, not float64"
    assert _impl.explain("bn_act", on_cuda(torch.float64))["triton"] == reason
    reason = "it takes tensors of one device, not of cuda:0 and cuda:1"
    assert _impl.explain("flow_cell", on_cuda(torch.float32), on_cuda(torch.float32, index=1))["triton"] == reason
    monkeypatch.setattr(_triton, "_too_old", lambda index: "it needs compute capability 8.0, this GPU has 7.0")
    assert _impl.resolve_impl("bn_act", "auto", on_cuda(torch.float32)) == "reference"
    monkeypatch.setattr(_triton, "_missing", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="bn_act: impl='triton' cannot run: triton is not installed"):
        _impl.resolve_impl("bn_act", "triton", on_cuda(torch.float32))


def test_noise_and_images_that_need_a_gradient_go_to_the_reference(modern_gpu):
    x, data = on_cuda(torch.float32), on_cuda(torch.float32, requires_grad=True)
    assert _impl.resolve_impl("residual_normal", "auto", x, x, data) == "reference"
    assert _impl.resolve_impl("logistic_mixture_log_prob", "auto", data, x) == "reference"
    assert _impl.resolve_impl("residual_normal", "auto", data, data, x) == "triton"


def test_every_schema_has_a_launcher_for_cuda():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nvae_fast::")}
    without = {name[11:] for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    built = {"depthwise_conv_cuda_fwd_counted", "depthwise_conv_cuda_bwd_counted"}  # with nvcc alone
    of_lists = {"adamax_place", "adamax_squares", "adamax_step_"}  # what stands for them on a GPU takes an arena
    assert len(names) > 30 and without - built == of_lists | {"power_iteration_add"}  # shared_weights' own kernels add
    assert F.bn_act.__module__ == "nvae_fast.kernels.bn_act.api"


def test_a_call_on_the_cpu_does_not_import_triton():
    code = (
        "import sys, torch; from nvae_fast import env, functional as F; env.environment();"
        "F.bn_act(torch.ones(2, 3, 4, 4), None, None, None, None, training=True);"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sums_are_cut_by_the_sizes_alone():
    for rows in (1, 5, 31, 32, 33, 300, 262144, 2**33):
        count, chunk = _triton.tasks(rows, 32, 341)
        assert count <= 341 and chunk % 32 == 0 and (count - 1) * chunk < rows <= count * chunk
    assert [_triton.power_of_2(n, 64) for n in (0, 1, 7, 33, 64, 192)] == [1, 1, 8, 64, 64, 64]
