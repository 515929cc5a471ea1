"""A folder with the interface of NVlabs/NVAE and none of its code: every module leads back to ours, on torch's operations."""

from __future__ import annotations

from pathlib import Path

FILES = {
    "model.py": """
import torch
from torch import nn
from distributions import Normal
from thirdparty.norms import check_place
from nvae_fast import NVAE
from nvae_fast.benchmarks.plain import plain
from nvae_fast.checkpoint.nvlabs import from_nvlabs_state_dict
from nvae_fast.config import NVAEConfig
from nvae_fast.layers.norm import bn_regularizer
from nvae_fast.regularization import SpectralState

class AutoEncoder(nn.Module):
    def __init__(self, args, writer, arch_instance):
        super().__init__()
        print("chatter")
        assert arch_instance == {"arch": args.arch_instance} and args.distributed is False
        config = NVAEConfig.from_nvlabs_args(vars(args))
        self.inner = NVAE(config)
        self.num_latent_scales, self.groups_per_scale = config.num_latent_scales, config.groups_per_scale
        self.crop_output = config.padding > 0
        self.sr_u, self.sr_v = {}, {}

    def load_state_dict(self, state):
        from_nvlabs_state_dict(self.inner, state)
        plain(self.inner)

    def draws(self, n, temperature=1.0):
        zeros = [torch.zeros(n, *shape).cuda() for shape in self.inner.config.latent_shapes]
        return [Normal(z, z).sample()[0] for z in zeros]

    def forward(self, x):
        check_place(x)
        out = self.inner(x, self.draws(len(x)))
        return out.logits, out.log_q, out.log_p, list(out.kl_all), out.kl_diag

    def sample(self, n, t):
        return self.inner.sample(n, t, self.draws(n))  # PLANT sample

    def decoder_output(self, logits):
        return self.inner.decoder_output(logits)

    def spectral_norm_parallel(self):
        state = SpectralState()
        key = "{0[0]}x{0[1]}".format
        vectors = {f"u/{key(k)}": t for k, t in self.sr_u.items()} | {f"v/{key(k)}": t for k, t in self.sr_v.items()}
        state.load_state_dict(vectors)
        return state(self.inner.convolutions())

    def batchnorm_loss(self):
        return bn_regularizer(self.inner.batch_norms())
""",
    "distributions.py": """
class Normal:
    def __init__(self, mu, log_sigma, temp=1.0):
        self.mu, self.sigma = mu, log_sigma.exp() * temp

    def sample(self):
        raise AssertionError("draws noise of its own")

    def sample_given_eps(self, eps):
        return eps * self.sigma + self.mu
""",
    "utils.py": """
import torch
from tensorboardX import SummaryWriter
from nvae_fast.objective import balance_kl, kl_alpha
import nvae_fast.objective as objective

def get_arch_cells(name):
    return {"arch": name}

def pre_process(x, num_bits):
    return x

def kl_balancer_coeff(num_scales, groups_per_scale, fun):
    assert num_scales == len(groups_per_scale)
    return torch.tensor(kl_alpha(groups_per_scale, fun)).cuda()

def kl_balancer(kl_all, kl_coeff, kl_balance, alpha_i):
    balanced, gamma = balance_kl(torch.stack(kl_all), kl_coeff, alpha_i.tolist(), balance=kl_balance)
    return balanced, gamma, None  # PLANT kl

def reconstruction_loss(output, x, crop):
    from distributions import Normal
    return objective.reconstruction_loss(output, x, 2 if crop else 0)  # PLANT recon
""",
    "thirdparty/norms.py": """
import torch

def check_place(x):
    if not x.is_cuda:
        raise ValueError("expected a tensor of a GPU")
    assert torch.distributed.get_world_size(torch.distributed.group.WORLD) == 1
""",
}


def write(folder: Path, **planted: str) -> Path:
    """The stand-in in `folder`; `planted` holds what the lines marked PLANT return instead, by mark."""
    for name, text in FILES.items():
        for mark, value in planted.items():
            lines = [line.partition("return")[0] + f"return {value}" if line.endswith(f"# PLANT {mark}") else line
                     for line in text.splitlines()]  # fmt: skip
            text = "\n".join(lines)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
