"""NVAE: a deep hierarchical VAE with bottom-up and top-down towers of residual cells (Vahdat & Kautz 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.cells import ARCHITECTURES, ActConv, Cell, DecoderCombiner, EluConv, EncoderCombiner, run_cells
from nvae_fast.checkpoint.model_files import ModelFiles
from nvae_fast.config import NVAEConfig
from nvae_fast.distributions import decoder_distribution, output_channels, reduce_bits
from nvae_fast.errors import InputError
from nvae_fast.flows import FlowCell, run_flow
from nvae_fast.kernels.inverted_residual import MEMORY
from nvae_fast.layers import BatchNormAct2d, InvertedResidual, WeightNormConv2d, shared_effective_weights
from nvae_fast.layers.norm import bn_regularizer
from nvae_fast.objective import balance_kl, kl_alpha, reconstruction_loss
from nvae_fast.regularization import SpectralState

Draw = Callable[[int, Tensor | None], tuple[Tensor, Tensor | None]]
"""(the latent of group i, h for what else reads it) from i and the top-down state h, None for group 0."""


class NVAEOutput(NamedTuple):
    """What a pass over a batch yields (N groups top-down, B images, Z latent channels, O head channels; nats)."""

    logits: Tensor  # [B, O, H, W] parameters of the output distribution
    kl_all: Tensor  # [N, B] KL of each group, summed over channels and space
    kl_diag: Tensor  # [N, Z] KL of each channel, summed over space, averaged over the batch
    log_q: Tensor  # [B] log density of the drawn latents under the posterior
    log_p: Tensor  # [B] and under the prior


def drawn_at_once(device: torch.device) -> bool:
    """Whether the noise of all groups is drawn in one launch: where launches cost."""
    return device.type == "cuda"


class NVAE(ModelFiles, nn.Module):
    """The model of a configuration. Images are [B, C, H, W] in [0, 1]; latents are drawn top-down, group 0 the smallest.

    `parameters()` come in the order of the public code, so that optimiser states carry over.
    """

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.config = c = config
        top_scale = c.num_preprocess_blocks + c.num_latent_scales - 1
        enc, dec = c.num_channels_enc, c.num_channels_dec
        top_h, top_w = (side // c.total_stride for side in c.image_size)
        self.prior_ftr0 = nn.Parameter(torch.rand(dec * 2**top_scale, top_h, top_w))
        self.stem = WeightNormConv2d(c.channels, enc, 3, padding=1)
        self.pre_process = nn.ModuleList()
        for block in range(c.num_preprocess_blocks):
            width = enc * 2**block
            self.pre_process.extend(self._cell("pre", width, width) for _ in range(c.num_preprocess_cells - 1))
            self.pre_process.append(self._cell("pre", width, 2 * width, stride=2))

        self.enc_tower = nn.ModuleList()
        if not c.vanilla:
            self._build_encoder_tower()
        top_width = enc * 2**top_scale
        self.enc0 = EluConv(top_width, top_width)  # and another ELU behind it

        scale_of_group = [s for s in reversed(range(c.num_latent_scales)) for _ in range(c.groups_per_scale[s])]
        z = c.num_latent_per_group
        self.enc_sampler = nn.ModuleList(
            WeightNormConv2d(enc * 2 ** (c.num_preprocess_blocks + s), 2 * z, 3, padding=1, adds_bias=False)
            for s in scale_of_group
        )
        self.dec_sampler = nn.ModuleList(EluConv(dec * 2 ** (c.num_preprocess_blocks + s), 2 * z) for s in scale_of_group[1:])
        self.nf_cells = nn.ModuleList(FlowCell(z) for _ in range(len(scale_of_group) * c.num_nf))
        if c.vanilla:
            self.stem_decoder = WeightNormConv2d(z, enc * 2**c.num_preprocess_blocks, 1)
        else:
            self.dec_tower = nn.ModuleList()
            self._build_decoder_tower()

        self.post_process = nn.ModuleList()
        for block in reversed(range(c.num_postprocess_blocks)):
            width = dec * 2**block
            self.post_process.append(self._cell("post", 2 * width, width, stride=-1))
            self.post_process.extend(self._cell("post", width, width) for _ in range(c.num_postprocess_cells - 1))
        head = output_channels(c.output_likelihood, c.channels, c.num_mixture_dec)
        self.image_conditional = nn.Sequential(nn.ELU(), WeightNormConv2d(dec, head, 3, padding=1))

    def _cell(self, place: str, in_channels: int, out_channels: int, stride: int = 1) -> Cell:
        ops = ARCHITECTURES[self.config.arch_instance][place]
        return Cell(in_channels, out_channels, ops, stride=stride, use_se=self.config.use_se)

    def _build_encoder_tower(self) -> None:
        c = self.config
        for s, groups in enumerate(c.groups_per_scale):
            scale = 2 ** (c.num_preprocess_blocks + s)
            enc, dec = c.num_channels_enc * scale, c.num_channels_dec * scale
            last_scale = s == c.num_latent_scales - 1
            for g in range(groups):
                self.enc_tower.extend(self._cell("enc", enc, enc) for _ in range(c.num_cell_per_cond_enc))
                if not (last_scale and g == groups - 1):
                    self.enc_tower.append(EncoderCombiner(enc, dec))
            if not last_scale:
                self.enc_tower.append(self._cell("enc", enc, 2 * enc, stride=2))

    def _build_decoder_tower(self) -> None:
        c = self.config
        for s in reversed(range(c.num_latent_scales)):
            dec = c.num_channels_dec * 2 ** (c.num_preprocess_blocks + s)
            for g in range(c.groups_per_scale[s]):
                if not (s == c.num_latent_scales - 1 and g == 0):
                    self.dec_tower.extend(self._cell("dec", dec, dec) for _ in range(c.num_cell_per_cond_dec))
                self.dec_tower.append(DecoderCombiner(dec, c.num_latent_per_group))
            if s > 0:
                self.dec_tower.append(self._cell("dec", dec, dec // 2, stride=-1))

    # ---- passes ----------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> NVAEOutput:
        """Encode and decode a batch. `noise`: one standard-normal tensor [B, Z, h, w] per group, top-down (None: drawn; on CUDA
        for all groups at once, so that a seed means other numbers there than on the CPU)."""
        with self._shared():
            return self.decode_posterior(self.bottom_up(x), noise)

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """The deterministic features that each group's posterior sees, top-down: [B, width, h, w] per group."""
        self._check_images(x)
        h = self.stem(2.0 * reduce_bits(x, self.config.num_x_bits) - 1.0)
        features: list[Tensor] = []
        h = run_cells([*self.pre_process, *self.enc_tower], h, look=features.append)
        return [tf.elu(self.enc0(h)), *reversed(features)]

    def decode_posterior(self, features: Sequence[Tensor], noise: Sequence[Tensor] | None = None,
                         latents: list[Tensor] | None = None) -> NVAEOutput:  # fmt: skip
        """The top-down pass, every latent drawn from its posterior (and added to `latents`), from `bottom_up`'s features."""
        noise = self._noise(noise, features[0].shape[0])
        combiners = [m for m in reversed(self.enc_tower) if isinstance(m, EncoderCombiner)]
        kl, log_q, log_p = [], [], []

        def posterior(i: int, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
            sampler, f, prior = self.enc_sampler[i], features[0], None
            if h is not None:
                f, h = combiners[i - 1](features[i], h, return_x=True)
                prior, h = self.dec_sampler[i - 1](h, return_x=True)
            cells = self.nf_cells[i * self.config.num_nf : (i + 1) * self.config.num_nf]
            flow = partial(run_flow, cells) if cells else None
            out = F.latent_group(sampler(f), prior, noise[i], bias=sampler.left_bias, flow=flow, residual=self.config.res_dist)
            for kept, of_group in zip((kl, log_q, log_p), out[1:], strict=True):
                kept.append(of_group)
            if latents is not None:
                latents.append(out.z)
            return out.z, h

        logits = self._top_down(posterior, features[0].shape[0])
        all_kl, all_q, all_p = map(torch.stack, (kl, log_q, log_p))  # [N, B, Z]
        return NVAEOutput(logits, all_kl.sum(2), all_kl.mean(1), all_q.sum((0, 2)), all_p.sum((0, 2)))

    def sample(self, n: int, temperature: float | Sequence[float] = 1.0, noise: Sequence[Tensor] | None = None,
               generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        """Logits [n, O, H, W] of n draws from the prior; `temperature` scales every sigma (a number, or one per group).
        `noise` as in `forward`, drawn with `generator`."""
        groups = len(self.config.latent_shapes)
        temperatures = [float(temperature)] * groups if isinstance(temperature, (int, float)) else list(temperature)
        if len(temperatures) != groups or min(temperatures) < 0:
            raise InputError(f"temperature={temperature} must be a number >= 0, or one per group ({groups} of them)")
        noise = self._noise(noise, n, generator)

        def prior(i: int, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if i == 0:
                mu = log_sigma = self.prior_ftr0.new_zeros(n, *self.config.latent_shapes[0])
            else:
                mu, log_sigma = self.dec_sampler[i - 1](h).chunk(2, dim=1)
            return F.normal_sample(mu, log_sigma, noise[i], temperature=temperatures[i], generator=generator), h

        with self._shared():
            return self._top_down(prior, n)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Logits [B, O, H, W] for given latents [B, Z, h, w], one per group, top-down."""
        self._check_noise(latents, latents[0].shape[0])
        with self._shared():
            return self._top_down(lambda i, h: (latents[i], h), latents[0].shape[0])

    def _top_down(self, draw: Draw, batch: int) -> Tensor:
        """Decoder and head for latents that `draw` supplies."""
        groups = count()

        def join(module: nn.Module, h: Tensor, **options: Any) -> Any:
            i = next(groups)
            z, passed = draw(i, h if i else None)
            return module(passed if i else h, z, **options)

        if self.config.vanilla:
            h = run_cells(self.post_process, self.stem_decoder(draw(0, None)[0]))
        else:
            h = self.prior_ftr0.expand(batch, -1, -1, -1)
            h = run_cells([*self.dec_tower, *self.post_process], h, join)
        return self.image_conditional(h)

    # ---- the objective ---------------------------------------------------------------------------------------------------

    def decoder_output(self, logits: Tensor):
        """The distribution of images that `logits` stand for: .log_prob(x), .sample(temperature, noise), .mean."""
        c = self.config
        return decoder_distribution(logits, likelihood=c.output_likelihood, channels=c.channels,
                                    num_mixtures=c.num_mixture_dec, num_bits=c.num_x_bits, compat=c.compat)  # fmt: skip

    def loss(self, x: Tensor, *, kl_coeff: float | Tensor = 1.0, spectral_coeff: float | Tensor = 0.0,
             noise: Sequence[Tensor] | None = None, spectral: SpectralState | None = None,
             reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Every term of the training objective by name (nats; B images, N groups).

        total = mean_B(recon + balanced_kl) + spectral_coeff * (spectral + bn). `recon` [B] is -log p(x|z), `kl` [B] the plain
        sum over groups, `balanced_kl` [B] = kl_coeff * sum_i gamma_i kl_i with gamma = `kl_coeffs` [N] (all 1 in eval mode or
        once kl_coeff is 1), `kl_all` [N, B]. `spectral` is the sum of all convolutions' largest singular values as tracked by
        the SpectralState (a fresh one if None), `bn` the BN regulariser; both are 0 while spectral_coeff is 0. `reduce` joins
        the mean KL of every group over processes, for the balancing (`objective.balance_kl`).
        """
        c = self.config
        parts = [m for m in self.modules() if isinstance(m, (nn.Conv2d, BatchNormAct2d))]  # in one walk: they take time
        with shared_effective_weights(parts):
            out = self(x, noise)
            bn = sr = out.log_q.new_zeros(())
            if isinstance(spectral_coeff, Tensor) or spectral_coeff:
                sr = (SpectralState() if spectral is None else spectral)([m for m in parts if isinstance(m, nn.Conv2d)])
                bn = bn_regularizer([m for m in parts if isinstance(m, BatchNormAct2d)])
        dist = self.decoder_output(out.logits)
        recon = reconstruction_loss(dist, reduce_bits(x, c.num_x_bits), c.padding)
        alpha = kl_alpha(c.groups_per_scale, c.training.kl_balance)
        balanced, gamma = balance_kl(out.kl_all, kl_coeff, alpha, balance=self.training, reduce=reduce)
        total = (recon + balanced).mean() + spectral_coeff * (sr + bn)
        return {
            "total": total, "recon": recon, "kl": out.kl_all.sum(0), "balanced_kl": balanced, "kl_all": out.kl_all,
            "kl_coeffs": gamma, "spectral": sr, "bn": bn, "logits": out.logits, "kl_diag": out.kl_diag,
            "log_q": out.log_q, "log_p": out.log_p,
        }  # fmt: skip

    # ---- parts ----------------------------------------------------------------------------------------------------------

    def _shared(self) -> AbstractContextManager[None]:
        """The weights of one pass, computed once, unless a pass around this one has them."""
        inside = getattr(self.stem, "effective", None) is not None
        return nullcontext() if inside else shared_effective_weights(self.convolutions())

    def convolutions(self) -> list[nn.Conv2d]:
        """Every convolution of the model, in parameter order."""
        return [m for m in self.modules() if isinstance(m, nn.Conv2d)]

    def batch_norms(self) -> list[BatchNormAct2d]:
        """Every batch normalisation of the model, in parameter order."""
        return [m for m in self.modules() if isinstance(m, BatchNormAct2d)]

    def set_memory(self, mode: str) -> NVAE:
        """What cells keep for backward: "fast", "balanced" or "low" (`functional.inverted_residual`, `functional.conv2d`).
        Returns self."""
        if mode not in MEMORY:
            raise InputError(f"memory '{mode}': expected one of {', '.join(MEMORY)}")
        for module in self.modules():
            if isinstance(module, (InvertedResidual, ActConv)):
                module.memory = mode
        return self

    def _check_images(self, x: Tensor) -> None:
        expected = (self.config.channels, *self.config.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise InputError(f"images of shape {tuple(x.shape)}: this model takes [B, {', '.join(map(str, expected))}]")
        if not x.is_floating_point():
            raise InputError(f"images of type {x.dtype}: expected floats in [0, 1]; divide integers by 255")

    def _noise(self, noise: Sequence[Tensor] | None, batch: int,
               generator: torch.Generator | None = None) -> Sequence[Tensor | None]:  # fmt: skip
        """That of every group, None where the group draws its own: on the CPU, whose numbers for a seed stand. On CUDA one draw
        is cut up, a launch instead of one for each group; channels-last, as the latents are, and each on 16 bytes."""
        if noise is not None:
            self._check_noise(noise, batch)
            return noise
        shapes, like = self.config.latent_shapes, self.prior_ftr0
        if not drawn_at_once(like.device):
            return [None] * len(shapes)
        sizes = [-(-batch * math.prod(shape) // 4) * 4 for shape in shapes]
        dtype = torch.promote_types(like.dtype, torch.float32)
        drawn = torch.randn(sum(sizes), generator=generator, dtype=dtype, device=like.device).split(sizes)
        return [
            flat[: batch * z * h * w].view(batch, h, w, z).permute(0, 3, 1, 2)
            for flat, (z, h, w) in zip(drawn, shapes, strict=True)
        ]

    def _check_noise(self, noise: Sequence[Tensor], batch: int) -> None:
        shapes = [(batch, *shape) for shape in self.config.latent_shapes]
        given = [tuple(t.shape) for t in noise]
        if given != shapes:
            raise InputError(f"{len(given)} noise or latent tensors of shapes {given}: expected one per group, {shapes}")
