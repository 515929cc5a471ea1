"""`benchmarks/launches.py`: what it counts without running a kernel is what Triton's interpreter is asked to run."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter

import pytest
import torch
from torch import nn

from nvae_fast import functional as F
from nvae_fast.benchmarks import launches as launches_module
from nvae_fast.benchmarks.launches import UPLOAD, Counts, Launches, count, count_sampling, weight
from nvae_fast.cells import Cell, FactorizedReduce, run_cells
from nvae_fast.cli import main
from nvae_fast.errors import RunError
from nvae_fast.flows import FlowCell
from nvae_fast.kernels import _auto
from nvae_fast.layers import InvertedResidual, WeightNormConv2d
from nvae_fast.model import NVAE
from nvae_fast.presets import PRESETS

SMALL = dataclasses.replace(
    PRESETS["demo"], image_size=(8, 8), padding=0, num_latent_scales=1, num_groups_per_scale=2, num_channels_enc=4,
    num_channels_dec=4, num_preprocess_blocks=1, num_postprocess_blocks=1, num_latent_per_group=4,
)  # fmt: skip


def cells():
    """The second one's last pass of backward is the first of the squeeze-excitation before it."""
    torch.manual_seed(0)
    modules = nn.ModuleList(Cell(4, 4, [op], stride=1, use_se=True) for op in ("mconv_e2k3g0", "res_bnswish"))
    x = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    run_cells(list(modules.to(memory_format=torch.channels_last).train()), x).sum().backward()


def encoder():
    torch.manual_seed(0)
    module = Cell(4, 4, ["res_bnswish"] * 2, stride=1, use_se=True).to(memory_format=torch.channels_last).train()
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    module(x).sum().backward()


def weights():
    convs = [WeightNormConv2d(3, 4, 3), WeightNormConv2d(4, 2, 1)]
    found = F.weight_norm([c.weight for c in convs], [c.log_weight_norm for c in convs], [None, None])
    u, v = ([torch.randn(n) for n in sizes] for sizes in ((4, 2), (27, 4)))
    (F.power_iteration(found, u, v, iterations=2)[0].sum() + sum(w.sum() for w in found)).backward()


def latents():
    tensors = [torch.randn(2, 3, 2, 2, requires_grad=True) for _ in range(4)]
    out = F.residual_normal(*tensors, torch.randn(2, 3, 2, 2))
    (out.z.sum() + out.kl.sum()).backward()


def pixels():
    params = torch.randn(1, 20, 2, 2, requires_grad=True)
    F.logistic_mixture_log_prob(torch.rand(1, 3, 2, 2), params, num_mixtures=2).sum().backward()


def flow():
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    FlowCell(2)(z).sum().backward()


@pytest.mark.parametrize("work", [cells, encoder, weights, latents, pixels, flow], ids=lambda f: f.__name__)
def test_what_is_counted_is_launched(launches, monkeypatch, work):
    monkeypatch.setattr(_auto, "choose", lambda op, impl, *rest, **options: impl)
    with launches() as real:
        work()
    monkeypatch.undo()  # the launchers in the place of their schemas, which is how `launches` reaches them
    with Launches().on_gpu(extension=False) as found:
        work()
    kernels = Counter(name for name in real if not name.startswith("torch."))
    assert kernels and kernels == Counter({name: n for name, n in found.names.items() if name.endswith("_kernel")})
    for name in ("cat", "clone", "stack", "zeros_like", "copy_", "_foreach_add_"):
        assert real.count(f"torch.{name}") - (name == "clone") * found.names[UPLOAD] == found.names[f"torch.{name}"], name


def plain_1x1(*parts):
    """The 1x1 convolutions of combiners, samplers and the like; a FactorizedReduce has its four put together."""
    found = [m for part in parts for m in part.modules() if isinstance(m, WeightNormConv2d) and m.kernel_size == (1, 1)]
    reduced = sum(isinstance(m, FactorizedReduce) for part in parts for m in part.modules())
    return len(found) - 4 * reduced


def test_the_count_of_a_small_preset():
    """Without the extension, ours is a cell's 6 and 7 launches, and the rest; with it a depthwise convolution is 1 and 1
    instead of 2 and 2. The plain model's are several times that."""
    ours, without, plain = count(SMALL, precision="fp32", batch=2)
    model = NVAE(SMALL)
    branches = sum(isinstance(m, InvertedResidual) for m in model.modules())
    for found in (ours, without):
        assert found["pointwise_conv_fwd_kernel"] == 2 * branches + plain_1x1(model)
    own = {f"depthwise_conv_{name}_kernel" for name in ("fwd", "g", "bwd")}
    native = {"depthwise_conv_cuda_fwd_kernel", "depthwise_conv_cuda_bwd_kernel"}
    assert all(ours[name] == branches == without[other] for name in native for other in own)
    assert not any(ours[other] or without[name] for name in native for other in own)
    assert without.total() - ours.total() == 2 * branches
    assert ours["adamax_step_kernel"] == ours["adamax_squares_kernel"] == ours["weight_norm_fwd_kernel"] == 1
    assert ours["logistic_mixture_fwd_kernel"] == 0 and ours["residual_normal_fwd_kernel"] == len(SMALL.latent_shapes)
    assert not any(name.startswith(("adamax", "pointwise", "power_iteration", "weight_norm")) for name in plain)
    assert without.total() <= 246 and plain.total() >= 5 * ours.total()  # no step back: lower it with every launch that goes


@pytest.mark.parametrize("extension", [True, False])
def test_the_count_of_samples(extension):
    """A combiner is a 1x1 convolution; a cell two, a depthwise convolution (without the extension of a normalised image) and
    its squeeze-excitation: no tables, no norms of weights, no copies of filters; of images two, at the top."""
    ours, plain = count_sampling(SMALL, batch=1, extension=extension)
    decoder = NVAE(SMALL)
    cells = sum(isinstance(m, Cell) for part in (decoder.dec_tower, decoder.post_process) for m in part)
    kernels = {name: n for name, n in ours.items() if name.endswith("_kernel")}
    depthwise = ["depthwise_conv_cuda_fwd"] if extension else ["bn_act_fwd", "depthwise_conv_fwd"]
    counts = {f"{name}_kernel": cells for name in (*depthwise, "se_residual_fwd")}
    ones = plain_1x1(decoder.dec_sampler, decoder.dec_tower, decoder.post_process)
    counts |= {"pointwise_conv_fwd_kernel": 2 * cells + ones, "residual_normal_sample_kernel": len(SMALL.latent_shapes)}
    assert kernels == counts and not ours[UPLOAD]
    assert ours["torch.clone"] <= 2 and ours.total() <= 24 + 2 * (not extension) and plain.total() >= 8 * ours.total()


def test_launches_of_operations_of_torch():
    def of(name, *args, overload="default"):
        return weight(getattr(getattr(torch.ops.aten, name), overload), args)

    t = torch.zeros(2)
    assert of("add", t, t, overload="Tensor") == 1 and of("view", t, [2]) == of("empty_like", t) == 0
    assert of("_foreach_add_", [t] * 111, 1, overload="Scalar") == 2 and of("_foreach_copy_", [t] * 65, [t] * 65) == 2
    assert of("convolution_backward", t, [True, True, False]) == 2 and of("add_", t, t, overload="Tensor") == 1


def test_what_torch_has_a_kernel_for_is_one_launch():
    """silu_backward is, though it can be written as others; matmul is what it comes to."""
    t = torch.zeros(2, 2)
    with Launches() as found, torch.inference_mode():
        torch.ops.aten.silu_backward(t, t)
        torch.matmul(t, t)
    assert found.names == Counter({"torch.silu_backward": 1, "torch.mm": 1})


def test_the_command(monkeypatch, capsys):
    ours = Counter({"a_kernel": 1500, UPLOAD: 10, "torch.add": 995, "torch.mul": 5})
    asked = []

    def counted(config, **options):
        asked.append(options)
        return Counts(ours, ours + Counter({"b_kernel": 90}), Counter({"torch.add": 5020}))

    monkeypatch.setattr(launches_module, "count", counted)
    found = Counter({"a_kernel": 90, "torch.add": 10}), Counter({"torch.add": 650})
    monkeypatch.setattr(launches_module, "count_sampling", lambda config: found)
    assert main(["estimate", "--preset", "demo", "--launches", "--precision", "bf16", "--memory", "low"]) == 0
    assert asked == [{"precision": "bf16", "memory": "low"}]
    assert capsys.readouterr().out.splitlines() == [
        "demo, batch 32, bf16, memory low: launches of a training step on a GPU, counted without one",
        "  ours     2510: 1500 of our kernels, 10 uploads, 1000 of torch's operations; ABOVE the 2500 aimed at",
        "           2600 where the extension was built without CUDA, with Triton's kernels alone",
        "  plain    5020: 2.0 times as many", "    1500  a_kernel", "     995  torch.add",
        "a batch of samples, fp32: ours 100 (90 of our kernels), plain 650: 6.5 times as many",
    ]  # fmt: skip


def test_without_triton_a_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    launches_module.launchers.cache_clear()
    with pytest.raises(RunError, match="triton is not installed: pip install"):
        count(SMALL)
