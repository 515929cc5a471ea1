"""Key names and shapes of official state dicts, generated here from the layout of the format and nothing else."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from nvae_fast import NVAE, NVAEConfig, to_nvlabs_state_dict

BN, BN5, E6, E3 = "res_bnswish", "res_bnswish5", "mconv_e6k5g0", "mconv_e3k5g0"
ARCHITECTURES = {  # ops of the cells of: encoder tower, decoder tower, pre-processing, post-processing
    "res_elu": (["res_elu"] * 2,) * 4,
    "res_bnelu": (["res_bnelu"] * 2,) * 4,
    "res_bnswish": ([BN] * 2,) * 4,
    "mbconv_sep": ([E6], [E6], [E3], [E3]),
    "mbconv_sep11": (["mconv_e6k11g0"], ["mconv_e6k11g0"], [E3], [E3]),
    "res_mbconv": ([BN, BN], [E6], [BN, BN], [E3]),
    "res53_mbconv": ([BN5, BN], [E6], [BN5, BN], [E3]),
    "res35_mbconv": ([BN, BN5], [E6], [BN, BN5], [E3]),
    "res55_mbconv": ([BN5, BN5], [E6], [BN5, BN5], [E3]),
    "res_mbconv9": ([BN, BN], ["mconv_e6k9g0"], [BN, BN], ["mconv_e3k9g0"]),
    "mbconv_res": ([E6], [BN, BN], [E3], [BN, BN]),
    "mbconv_den": ([E6], [E6], ["mconv_e3k5g8"], ["mconv_e3k5g8"]),
}


class Layout(dict):
    """Shapes by key, written down part by part."""

    def conv(self, prefix: str, cout: int, cin: int, k: int, bias: bool = True) -> None:
        self[f"{prefix}.weight"] = (cout, cin, k, k)
        if bias:
            self[f"{prefix}.bias"] = (cout,)
        self[f"{prefix}.log_weight_norm"] = (cout, 1, 1, 1)

    def plain(self, prefix: str, cout: int, cin: int, k: int) -> None:
        self[f"{prefix}.weight"] = self[f"{prefix}.weight_normalized"] = (cout, cin, k, k)

    def bn(self, prefix: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            self[f"{prefix}.{leaf}"] = (channels,)
        self[f"{prefix}.num_batches_tracked"] = ()

    def cell(self, prefix: str, kind: str, ops: list[str], cin: int, cout: int, se: bool) -> None:
        if kind == "down":
            for i in (1, 2, 3, 4):
                self.conv(f"{prefix}.skip.conv_{i}", cout // 4 if i < 4 else cout - 3 * (cout // 4), cin, 1)
        if kind == "up":
            self.conv(f"{prefix}.skip.1", cout, cin, 1, bias=False)
        for j, op in enumerate(ops):
            self.op(f"{prefix}._ops.{j}", op, cin if j == 0 else cout, cout, first=1 if kind == "up" and j == 0 else 0)
        if se:
            hidden = max(cout // 16, 4)
            self[f"{prefix}.se.se.0.weight"], self[f"{prefix}.se.se.0.bias"] = (hidden, cout), (hidden,)
            self[f"{prefix}.se.se.2.weight"], self[f"{prefix}.se.se.2.bias"] = (cout, hidden), (cout,)

    def op(self, prefix: str, op: str, cin: int, cout: int, first: int) -> None:
        if op.startswith("res"):
            bn = {"res_elu": None, "res_bnelu": "bn.bn"}.get(op, "bn_act")
            if bn:
                self.bn(f"{prefix}.{bn}", cin)
            self.conv(f"{prefix}.conv_0", cout, cin, 3)
            return
        expansion, k, groups = map(int, re.findall(r"\d+", op))
        hidden = cin * expansion
        parts = [f"{prefix}.conv.{first + i}" for i in range(5)]
        self.bn(f"{parts[0]}.bn", cin)
        self.plain(f"{parts[1]}.conv.0", hidden, cin, 1)
        self.bn(f"{parts[1]}.conv.1", hidden)
        self.plain(f"{parts[2]}.conv.0", hidden, hidden // (groups or hidden), k)
        self.bn(f"{parts[2]}.conv.1", hidden)
        self.plain(parts[3], cout, hidden, 1)
        self.bn(f"{parts[4]}.bn", cout)


def official_layout(c: NVAEConfig, head: int) -> Layout:
    """The state dict of the public model with the flags in `c` and `head` output channels."""
    out = Layout()
    enc_ops, dec_ops, pre_ops, post_ops = ARCHITECTURES[c.arch_instance]
    p, s_all, z, se = c.num_preprocess_blocks, c.num_latent_scales, c.num_latent_per_group, c.use_se
    groups, n = [], c.num_groups_per_scale
    for _ in range(s_all):
        groups.append(n)
        n = max(c.min_groups_per_scale, n // 2) if c.ada_groups else n
    vanilla = s_all == 1 and c.num_groups_per_scale == 1
    enc, dec = ([width * 2**level for level in range(p + s_all)] for width in (c.num_channels_enc, c.num_channels_dec))
    height, width = (side // 2 ** (p + s_all - 1) for side in c.image_size)

    out["prior_ftr0"] = (dec[-1], height, width)
    out.conv("stem", enc[0], c.channels, 3)
    i = 0
    for block in range(p):
        for cell in range(c.num_preprocess_cells):
            down = cell == c.num_preprocess_cells - 1
            out.cell(f"pre_process.{i}", "down" if down else "normal", pre_ops, enc[block], enc[block + down], se)
            i += 1
    i = 0
    for s in range(s_all if not vanilla else 0):
        for g in range(groups[s]):
            for _ in range(c.num_cell_per_cond_enc):
                out.cell(f"enc_tower.{i}", "normal", enc_ops, enc[p + s], enc[p + s], se)
                i += 1
            if (s, g) != (s_all - 1, groups[-1] - 1):
                out.conv(f"enc_tower.{i}.conv", enc[p + s], dec[p + s], 1)
                i += 1
        if s < s_all - 1:
            out.cell(f"enc_tower.{i}", "down", enc_ops, enc[p + s], enc[p + s + 1], se)
            i += 1
    out.conv("enc0.1", enc[-1], enc[-1], 1)
    levels = [p + s for s in reversed(range(s_all)) for _ in range(groups[s])]  # top-down
    for k, level in enumerate(levels):
        out.conv(f"enc_sampler.{k}", 2 * z, enc[level], 3)
    for k, level in enumerate(levels[1:]):
        out.conv(f"dec_sampler.{k}.1", 2 * z, dec[level], 1)
    for k in range(len(levels) * c.num_nf):
        for half in ("cell1", "cell2"):
            prefix = f"nf_cells.{k}.{half}"
            out.conv(f"{prefix}.conv.convz.0", 6 * z, z, 3, bias=False)
            out.conv(f"{prefix}.conv.convz.2", 6 * z, 1, 5, bias=False)
            out.conv(f"{prefix}.mu.conv_0", z, 6 * z, 1)
    if vanilla:
        out.conv("stem_decoder", enc[p], z, 1)
    else:
        i = 0
        for s in reversed(range(s_all)):
            for g in range(groups[s]):
                for _ in range(c.num_cell_per_cond_dec if (s, g) != (s_all - 1, 0) else 0):
                    out.cell(f"dec_tower.{i}", "normal", dec_ops, dec[p + s], dec[p + s], se)
                    i += 1
                out.conv(f"dec_tower.{i}.conv", dec[p + s], dec[p + s] + z, 1)
                i += 1
            if s > 0:
                out.cell(f"dec_tower.{i}", "up", dec_ops, dec[p + s], dec[p + s - 1], se)
                i += 1
    i = 0
    for block in reversed(range(p)):
        for cell in range(c.num_postprocess_cells):
            up = cell == 0
            out.cell(f"post_process.{i}", "up" if up else "normal", post_ops, dec[block + up], dec[block], se)
            i += 1
    out.conv("image_conditional.1", head, dec[0], 3)
    return out


SMALL = NVAEConfig(
    channels=3, num_latent_scales=2, num_groups_per_scale=3, num_latent_per_group=3, ada_groups=True, num_channels_enc=8,
    num_channels_dec=16, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=2, num_postprocess_cells=2,
    num_cell_per_cond_dec=2, use_se=True, res_dist=True,
)  # fmt: skip
VARIANTS = {
    "no SE": (dict(use_se=False), 100),
    "one flow": (dict(num_nf=1), 100),
    "two flows, normal decoder": (dict(num_nf=2, num_mixture_dec=1), 6),
    "three scales, uneven groups": (dict(num_latent_scales=3, num_groups_per_scale=5, min_groups_per_scale=2), 100),
    "same groups at each scale": (dict(ada_groups=False, num_cell_per_cond_enc=2, num_cell_per_cond_dec=1), 100),
    "wider encoder": (dict(num_channels_enc=20, num_channels_dec=12, arch_instance="mbconv_sep"), 100),
    "uneven blocks": (dict(num_preprocess_blocks=2, num_postprocess_blocks=2, num_preprocess_cells=1,
                           num_postprocess_cells=3), 100),
    "grey": (dict(channels=1, padding=2, likelihood="bernoulli"), 1),
    "vanilla": (dict(num_latent_scales=1, num_groups_per_scale=1, num_channels_dec=8), 100),
    "vanilla with flow": (dict(num_latent_scales=1, num_groups_per_scale=1, num_channels_dec=8, num_nf=1, use_se=False), 100),
    "one scale": (dict(num_latent_scales=1, arch_instance="mbconv_res"), 100),
}  # fmt: skip


def check(config: NVAEConfig, head: int) -> None:
    with torch.device("meta"):
        state = to_nvlabs_state_dict(NVAE(config))
    expected = official_layout(config, head)
    assert state.keys() == expected.keys()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected
    for key, tensor in state.items():
        assert tensor.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_of_every_architecture(arch):
    check(dataclasses.replace(SMALL, arch_instance=arch), 100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_of_every_structure(variant):
    changes, head = VARIANTS[variant]
    check(dataclasses.replace(SMALL, **changes), head)


def test_the_layout_written_down_here_is_that_of_the_official_files(official):
    head = official.state["image_conditional.1.bias"].numel()
    assert official_layout(official.config, head) == {k: tuple(v.shape) for k, v in official.state.items()}
