"""Every cell, skip, combiner and flow against the public reference: outputs, gradients, BN statistics, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvae_fast.cells import ARCHITECTURES, Cell, DecoderCombiner, EncoderCombiner, FactorizedReduce
from nvae_fast.checkpoint.nvlabs import from_nvlabs_state_dict, to_nvlabs_state_dict
from nvae_fast.errors import InputError
from nvae_fast.flows import AutoregressiveShift, FlowCell
from nvae_fast.layers import MaskedConv2d, SqueezeExcite, WeightNormConv2d

OPS = (
    "res_elu",
    "res_bnelu",
    "res_bnswish",
    "res_bnswish5",
    "mconv_e3k5g0",
    "mconv_e3k5g8",
    "mconv_e6k5g0",
    "mconv_e6k11g0",
)
STRIDES = {"normal_enc": (1, 8), "down_enc": (2, 16), "up_dec": (-1, 4)}
CASES = {f"cell/{op}/{kind}": (lambda op=op, s=s, c=c: Cell(8, c, [op], stride=s, use_se=True))
         for op in OPS for kind, (s, c) in STRIDES.items()}  # fmt: skip
CASES |= {
    "conv2d_wn_bias": lambda: WeightNormConv2d(3, 5, 3, padding=1),
    "enc_combiner": lambda: EncoderCombiner(6, 8),
    "dec_combiner": lambda: DecoderCombiner(8, 3),
    "factorized_reduce_odd": lambda: FactorizedReduce(5, 10),
    "se_40": lambda: SqueezeExcite(80),
    "ar_cell_mirror0": lambda: AutoregressiveShift(4, mirror=False),
    "ar_cell_mirror1": lambda: AutoregressiveShift(4, mirror=True),
    "ar_pair": lambda: FlowCell(4),
}
GATE = dict(rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_block(blocks, case):
    module = CASES[case]()
    from_nvlabs_state_dict(module, blocks.under(f"{case}/state/"))
    inputs = [blocks[f"{case}/in{i}"].clone().requires_grad_() for i in (0, 1) if f"{case}/in{i}" in blocks.tensors]
    if case.startswith("ar_"):
        inputs = inputs[:1]  # the encoder feature is not used
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(*inputs), blocks[f"{case}/out_eval"], **GATE)
    out = module.train()(*inputs)
    torch.testing.assert_close(out.detach(), blocks[f"{case}/out_train"], **GATE)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for i, x in enumerate(inputs):
        torch.testing.assert_close(x.grad, blocks[f"{case}/grad_in{i}"], rtol=1e-4, atol=1e-4)
    grads = blocks.under(f"{case}/grad/")
    assert grads
    by_name = to_nvlabs_state_dict(module)  # the tensors under official names ...
    ours = {p.data_ptr(): p for p in module.parameters()}  # ... and the parameters that own their memory
    scale = max(g.norm() for g in grads.values())
    for name, expected in grads.items():
        grad = ours[by_name[name].data_ptr()].grad
        assert (grad - expected).norm() <= 1e-3 * expected.norm() + 2e-6 * scale, name
    for name, expected in blocks.under(f"{case}/bn_after/").items():
        torch.testing.assert_close(to_nvlabs_state_dict(module)[name], expected, rtol=1e-5, atol=1e-5)


def test_weight_norm_starts_at_the_official_value(blocks):
    for name, conv in {
        "conv2d": WeightNormConv2d(3, 5, 3, padding=1),
        "arconv": MaskedConv2d(4, 24, 3, strict=True),
    }.items():
        with torch.no_grad():
            conv.weight.copy_(blocks[f"fresh_init/{name}/weight"])
        mask = torch.ones(()) if conv.mask is None else conv.mask
        norm = (conv.weight * mask).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = blocks[f"fresh_init/{name}/log_weight_norm"]
        torch.testing.assert_close(torch.log(norm + 1e-2).detach(), expected)
        fresh = type(conv)(4, 24, 3, strict=True) if name == "arconv" else type(conv)(3, 5, 3, padding=1)
        start = (fresh.weight * mask).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(fresh.log_weight_norm, torch.log(start + 1e-2))
        with torch.no_grad():
            conv.log_weight_norm.copy_(expected)
        torch.testing.assert_close(conv.effective_weight().detach(), blocks[f"fresh_init/{name}/weight_used"])


def test_last_flow_convolution_starts_ten_times_smaller():
    conv = AutoregressiveShift(4, mirror=False).conv_out
    norm = (conv.weight * conv.mask).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.log_weight_norm.exp(), 0.1 * (norm + 1e-2))


def test_data_dependent_initialisation(blocks):
    conv = WeightNormConv2d(4, 6, 3, 2, 1, data_init=True)
    before = blocks.under("conv2d_data_init/state_before/")
    with torch.no_grad():
        for name, value in before.items():
            getattr(conv, name).copy_(value)
    x = blocks["conv2d_data_init/in0"]
    first = conv(x)
    torch.testing.assert_close(first.detach(), blocks["conv2d_data_init/out_first_call"], **GATE)
    for name, value in blocks.under("conv2d_data_init/state_after/").items():
        torch.testing.assert_close(getattr(conv, name).detach(), value, **GATE)
    after = conv.log_weight_norm.clone()
    conv(3 * x + 1)
    assert torch.equal(conv.log_weight_norm, after), "initialised a second time"
    loaded = WeightNormConv2d(4, 6, 3, 2, 1, data_init=True)
    loaded.load_state_dict(conv.state_dict())
    torch.testing.assert_close(loaded(x), conv(x), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("place", ("enc", "dec", "pre", "post"))
def test_every_architecture_builds_runs_and_trains_at_every_stride(arch, place):
    for stride, width, side in ((1, 8, 6), (2, 16, 3), (-1, 4, 12)):
        cell = Cell(8, width, ARCHITECTURES[arch][place], stride=stride, use_se=False)
        out = cell(torch.randn(2, 8, 6, 6))
        assert out.shape == (2, width, side, side)
        out.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


def test_grouped_convolution_names_the_width_that_does_not_divide():
    with pytest.raises(InputError, match="hidden width 15 = 5 [*] 3 must be a multiple of groups=8"):
        Cell(5, 5, ["mconv_e3k5g8"], stride=1, use_se=False)


def test_no_module_keeps_a_graph_after_the_pass():
    cell = Cell(8, 8, ["res_bnswish"], stride=1, use_se=True)
    cell(torch.randn(2, 8, 4, 4)).sum().backward()
    assert all(m.effective is None for m in cell.modules() if isinstance(m, WeightNormConv2d))
    assert isinstance(cell.ops[0].conv, nn.Conv2d)
