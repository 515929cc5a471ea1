from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch

from nvae_fast import env
from nvae_fast import functional as F
from nvae_fast.kernels import _impl, use_impl
from nvae_fast.kernels import residual_normal as rn

X = torch.randn(2, 3, 4, 4)
HAS_NATIVE = _impl.load_native()[0] is not None


@pytest.fixture
def table(monkeypatch):
    """An empty table of ops."""
    monkeypatch.setattr(_impl, "_ops", {})
    return _impl


def no(reason):
    return lambda tensors: reason


def yes(tensors):
    return None


def test_auto_takes_the_first_that_can_run(table):
    table.register("op", cuda=no("no CUDA"), triton=yes, cpu=yes)
    assert table.resolve_impl("op", "auto", X) == "triton"
    assert table.resolve_impl("op", "cpu", X) == "cpu"
    assert table.resolve_impl("op", "reference", X) == "reference"
    table.register("op", cuda=no("no CUDA"))
    assert table.resolve_impl("op", "auto", X) == "reference"
    assert table.explain("op", X) == {"cuda": "no CUDA", "reference": None}
    assert table.table() == [{"op": "op", "auto": "reference", "not": {"cuda": "no CUDA"}}]


def test_a_named_implementation_never_falls_back(table):
    table.register("op", cuda=no("these tensors are on the CPU"), cpu=yes)
    with pytest.raises(RuntimeError, match="^op: impl='cuda' cannot run: these tensors are on the CPU; impl='auto' .*"):
        table.resolve_impl("op", "cuda", X)
    with pytest.raises(RuntimeError, match="^op has no 'triton' implementation: use .*auto.* cuda, cpu, reference$"):
        table.resolve_impl("op", "triton", X)
    with pytest.raises(ValueError, match="^unknown impl 'fast': expected one of auto, reference, cpu, triton, cuda$"):
        table.resolve_impl("op", "fast", X)


def test_use_impl_changes_auto_only(table):
    table.register("op", cuda=no("no CUDA"), cpu=yes)
    table.register("plain")
    with use_impl("reference"):
        assert table.resolve_impl("op", "auto", X) == "reference"
        assert table.resolve_impl("op", "cpu", X) == "cpu"
        with use_impl("auto"):
            assert table.resolve_impl("op", "auto", X) == "cpu"
        assert table.resolve_impl("op", "auto", X) == "reference"
    with use_impl("cuda"):
        assert table.resolve_impl("plain", "auto", X) == "reference"
        with pytest.raises(RuntimeError, match="op: impl='cuda' cannot run: no CUDA"):
            table.resolve_impl("op", "auto", X)
    assert table.resolve_impl("op", "auto", X) == "cpu"
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        use_impl("fast")
    block = use_impl("reference")
    with block, block:
        pass
    assert table.resolve_impl("op", "auto", X) == "cpu"


def test_a_chosen_implementation_that_cannot_run_raises_also_where_auto_would_prefer_the_reference():
    planar, weight = torch.zeros(2, 8, 4, 4), torch.zeros(8, 1, 3, 3)
    with use_impl("triton"), pytest.raises(RuntimeError, match="depthwise_conv: impl='triton' cannot run: it takes cuda"):
        F.depthwise_conv(planar, weight)
    with use_impl("triton"), pytest.raises(RuntimeError, match="se_residual: impl='triton' cannot run: it takes cuda"):
        F.se_residual(planar, planar.bfloat16(), None, None, None, None)
    with use_impl("cuda"):  # of which bn_act has none
        F.bn_act(planar, None, None, None, None, training=True)


def test_use_impl_is_undone_by_an_error(table):
    table.register("op", cpu=yes)
    with pytest.raises(KeyError), use_impl("reference"):
        raise KeyError
    assert table.resolve_impl("op", "auto", X) == "cpu"


def test_backward_on_another_thread_follows_its_forward():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float32, requires_grad=True)
    outputs = [rn.residual_normal(x, x, noise=torch.ones(1, 2, 4, 4)).kl.sum()]
    with use_impl("reference"):
        outputs.append(rn.residual_normal(x, x, noise=torch.ones(1, 2, 4, 4)).kl.sum())
    gradients = []
    for out in outputs:
        thread = threading.Thread(target=lambda out=out: gradients.append(torch.autograd.grad(out, x)[0]))
        thread.start()
        thread.join()
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not HAS_NATIVE, reason="built without the native extension")
def test_use_impl_inside_and_around_a_compiled_function():
    noise = torch.randn(2, 3, 4, 4)
    f = torch.compile(lambda x: rn.residual_normal(x, x, noise=noise).z, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    fused = f(X)
    with use_impl("reference"):
        plain = f(X)
        assert torch.equal(plain, rn.residual_normal(X, X, noise=noise, impl="reference").z)
    assert torch.equal(fused, rn.residual_normal(X, X, noise=noise, impl="cpu").z)
    assert torch.equal(f(X), fused)


def test_a_missing_extension_is_said_once(monkeypatch):
    reason = "nvae_fast was installed without its native extension"
    monkeypatch.setattr(_impl, "load_native", lambda: (None, reason))
    _impl._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _impl.table()
        assert not said
        for _ in range(3):
            rn.residual_normal(X, X)
    _impl._say_once.cache_clear()
    assert [str(w.message) for w in said] == [f"{reason}; until then ops run their PyTorch references"]
    with pytest.raises(RuntimeError, match=reason):
        rn.residual_normal(X, X, impl="cpu")


@pytest.mark.skipif(not HAS_NATIVE, reason="built without the native extension")
def test_another_torch_than_the_one_built_for(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    module, reason = _impl.load_native.__wrapped__()
    assert module is None and reason.endswith(", this is 99.0: reinstall nvae_fast") and "\n" not in reason


OTHER_SCHEMAS = """
import torch
define = torch.library.define
torch.library.define = lambda name, schema: define(name, schema.replace("int act)", "int act, bool new=False)"))
from nvae_fast.kernels import _impl, bn_act
print(*_impl.load_native())
print(torch._C._dispatch_has_kernel_for_dispatch_key("nvae_fast::bn_act_stats", "CPU"))
"""


@pytest.mark.skipif(not HAS_NATIVE, reason="built without the native extension")
def test_an_extension_of_other_schemas_than_python_has_is_a_reason_not_an_abort():
    run = subprocess.run([sys.executable, "-c", OTHER_SCHEMAS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said, registered = run.stdout.splitlines()
    assert said.startswith("None the native extension does not load (") and said.endswith("): reinstall nvae_fast")
    assert registered == "False"


def test_env_names_every_op_and_the_reasons():
    facts = env.environment()
    rows = {(row["device"], row["dtype"], row["op"]): row for row in facts["ops"]}
    row = rows["cpu", "float32", "residual_normal"]
    assert row["auto"] == ("cpu" if HAS_NATIVE else "reference")
    assert facts["extension"]["loaded"] == HAS_NATIVE
    printed = subprocess.run([sys.executable, "-m", "nvae_fast.env"], capture_output=True, text=True, check=True).stdout
    assert all(op in printed for op in ("residual_normal", "normal_sample", "torch " + torch.__version__.split("+")[0]))
