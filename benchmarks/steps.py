"""A whole training step of a preset, ours beside the same model in plain PyTorch: forward, loss with both regularisers,
backward, Adamax. Checked against the same step in float64 before it is timed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvae_fast.benchmarks.plain import plain
from nvae_fast.benchmarks.suite import COMPILED
from nvae_fast.benchmarks.timing import gpu_columns, gpu_work, interleaved, peak_bytes
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.kernels._impl import use_impl
from nvae_fast.layers.norm import bn_regularizer
from nvae_fast.model import NVAE
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.training.step import FIRST_SCALE

if TYPE_CHECKING:
    from nvae_fast.benchmarks.nvlabs import Checkout

KL_COEFF, SPECTRAL_COEFF = 0.5, 1e-2  # in the middle of a run
SECONDS = 60.0
FORMATS = {"ours:auto": torch.channels_last, "eager_channels_last": torch.channels_last, "eager": torch.contiguous_format}
"""What competes. The eager ones run the model as published (plain.py) on torch's own operations, and torch's multi-tensor
Adamax."""


class Step:
    """One contender: a model, optimiser and spectral state of its own, on a batch with the latents' noise given."""

    def __init__(self, model: nn.Module, spectral: SpectralState, x: Tensor, noise: list[Tensor], impl: str,
                 dtype: torch.dtype = torch.float32, config: NVAEConfig | None = None) -> None:  # fmt: skip
        self.model, self.spectral, self.x, self.noise, self.impl, self.dtype = model, spectral, x, noise, impl, dtype
        self.config: NVAEConfig = model.config if config is None else config
        self.total: Callable[[], Tensor] = self._total
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(x.device.type, FIRST_SCALE, enabled=dtype == torch.float16)

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.impl == "auto":
            return make_optimizer(self.model)
        training = self.config.training
        return torch.optim.Adamax(self.model.parameters(), lr=training.learning_rate, eps=training.adamax_eps,
                                  weight_decay=training.weight_decay, foreach=True)  # fmt: skip

    def backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with use_impl(self.impl):
            with lowered(self.x.device, self.dtype):
                total = self.total()
            self.scaler.scale(total).backward()
        return total.detach()

    def _total(self) -> Tensor:
        terms = self.model.loss(
            self.x, kl_coeff=KL_COEFF, spectral_coeff=SPECTRAL_COEFF, noise=self.noise, spectral=self.spectral
        )
        return terms["total"]

    def __call__(self) -> None:
        self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def numbers(self) -> tuple[float, Tensor]:
        """(loss, all gradients in a row), in float64, without an update."""
        loss = self.backward()
        gradients = torch.cat([p.grad.double().flatten() for p in self.model.parameters()])
        return loss.double().item(), gradients / self.scaler.get_scale()


def lowered(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; nothing for float32."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low)


def shrunk(config: NVAEConfig, layers: int | None = None, batch_size: int | None = None) -> NVAEConfig:
    """`config` with at most `layers` groups of a scale and cells of a kind, and another batch, as its name then says. A model
    of one scale keeps two groups: with one it would be another kind of model."""
    label, changes = config.name, {}
    if layers is not None:
        if layers < 1:
            raise InputError(f"--layers={layers} must be at least 1")
        label += f"/layers{layers}"
        counts = ("num_groups_per_scale", "num_cell_per_cond_enc", "num_cell_per_cond_dec", "num_preprocess_cells",
                  "num_postprocess_cells", "min_groups_per_scale")  # fmt: skip
        changes = {name: min(layers, getattr(config, name)) for name in counts}
        if config.num_latent_scales == 1 and not config.vanilla:
            changes["num_groups_per_scale"] = max(2, changes["num_groups_per_scale"])
    if batch_size is not None:
        label += f"/batch{batch_size}"
        changes["training"] = dataclasses.replace(config.training, batch_size=batch_size)
    return dataclasses.replace(config, name=label, **changes)


def make_batch(config: NVAEConfig, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Images [B, C, H, W] of the configuration's kind and batch, and the noise of every group."""
    batch = config.training.batch_size
    x = torch.rand(batch, config.channels, *config.image_size, device=device)
    if config.output_likelihood == "bernoulli":
        x = (x > 0.5).float()
    return x, [torch.randn(batch, *shape, device=device) for shape in config.latent_shapes]


def contenders(config: NVAEConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """Every contender by name, and "exact" in float64, all from the same weights, singular vectors, batch and noise."""
    torch.manual_seed(0)
    model = NVAE(config).to(device).train()
    spectral = SpectralState()
    with use_impl("reference"), torch.no_grad():
        spectral(model.convolutions())
    x, noise = make_batch(config, device)
    steps = {}
    for name, layout in FORMATS.items():
        own, impl = copy.deepcopy(model).to(memory_format=layout), "auto"
        if name != "ours:auto":
            own, impl = plain(own), "reference"
        steps[name] = Step(own, _warm(spectral), x.contiguous(memory_format=layout), noise, impl, dtype)
    doubles = x.double(), [t.double() for t in noise]
    steps["exact"] = Step(plain(copy.deepcopy(model)).double(), _warm(spectral, torch.float64), *doubles, "reference")
    return steps


def _warm(spectral: SpectralState, dtype: torch.dtype = torch.float32) -> SpectralState:
    """A copy that iterates as in the middle of a run."""
    state = SpectralState()
    state.load_state_dict({key: t.to(dtype) for key, t in spectral.state_dict().items()})
    return state


def check(
    got: tuple[float, Tensor], plain: tuple[float, Tensor], truth: tuple[float, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Loss and gradient vector: relative errors within 2 (that of the plain step + eps), the vector's in the 2-norm. error and
    budget are those of the one nearer to its limit, None where they are not finite."""

    def errors(found: tuple[float, Tensor]) -> list[float]:
        return [abs(found[0] - truth[0]) / abs(truth[0]), float((found[1] - truth[1]).norm() / truth[1].norm())]

    eps = torch.finfo(dtype).eps
    pairs = [(error, 2 * (limit + eps)) for error, limit in zip(errors(got), errors(plain), strict=True)]
    wild = next((pair for pair in pairs if not math.isfinite(sum(pair))), None)
    error, budget = wild or max(pairs, key=lambda pair: pair[0] / pair[1])
    shown = {key: v if math.isfinite(v) else None for key, v in (("error", error), ("budget", budget))}
    return {"ok": wild is None and all(e <= b for e, b in pairs)} | shown


def check_all(steps: dict[str, Step], exact: Step) -> dict[str, dict[str, Any]]:
    """`check` of every contender, the yardstick being the eager one that is further off, in the contender's type."""
    eager = {name: step for name, step in steps.items() if name in FORMATS and step.impl == "reference"}
    one = eager["eager"]
    others = {s.dtype: s for s in steps.values() if s.dtype != one.dtype}
    for dtype in others:
        others[dtype] = Step(copy.deepcopy(one.model), _warm(one.spectral), one.x, one.noise, one.impl, dtype)
    truth = exact.numbers()
    numbers = {name: step.numbers() for name, step in steps.items()}
    furthest = max((numbers[name] for name in eager), key=lambda n: float((n[1] - truth[1]).norm()))
    yardsticks = {one.dtype: furthest} | {dtype: step.numbers() for dtype, step in others.items()}
    return {name: check(numbers[name], yardsticks[s.dtype], truth, s.dtype) for name, s in steps.items()}


def compiled(ours: Step, say: Callable[[str], None], name: str = "compile") -> Step | None:
    """Our model on torch's own operations, its forward and loss, and their backward, under torch.compile in the mode that
    `COMPILED` has for the name; None where that fails. The regularisers of the weights stay outside, and it has the rewrites of
    our modules: otherwise Inductor of torch 2.13 stops with an error of its own."""
    step = Step(copy.deepcopy(ours.model), copy.deepcopy(ours.spectral), ours.x, ours.noise, "reference", ours.dtype)
    model, inner = step.model, torch.compile(step.model.loss, mode=COMPILED[name])

    def total() -> Tensor:
        loss = inner(step.x, kl_coeff=KL_COEFF, noise=step.noise)["total"]
        return loss + SPECTRAL_COEFF * (step.spectral(model.convolutions()) + bn_regularizer(model.batch_norms()))

    step.total = total
    try:
        step.backward()
    except Exception as error:  # of Dynamo, Inductor or the compiler it calls
        say(f"  no row for {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    step.spectral.load_state_dict(ours.spectral.state_dict())
    return step


def measure_step(
    config: NVAEConfig, *, rounds: int, device: torch.device, compilers: Sequence[str] = (), dtype: torch.dtype = torch.float32,
    checkout: Checkout | None = None, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one configuration's step, ours first: in float32, or under autocast to `dtype`. With a `checkout`, the
    published code competes."""
    steps = contenders(config, device, dtype)
    exact = steps.pop("exact")
    ours = steps["ours:auto"]
    rivals = {name: compiled(ours, say, name) for name in compilers}
    rivals["nvlabs"] = checkout.step(ours, dtype, say) if checkout else None
    on_gpu = device.type == "cuda"
    if on_gpu:
        rivals |= recorded(steps, say)
    steps |= {name: step for name, step in rivals.items() if step is not None}
    checks = check_all(steps, exact)
    peaks, work = {}, {}
    for name, step in steps.items():
        step()  # the optimiser's state is there from now on
        step.optimizer.zero_grad(set_to_none=True)
        hidden = name.endswith("graph") or (name in COMPILED and not on_gpu)  # their memory was taken before, or elsewhere
        peaks[name] = None if hidden else peak_bytes(step, device)
        work[name] = gpu_work(step) if on_gpu else None
    times = interleaved(dict(steps), rounds=rounds, budget_s=SECONDS)
    shape = [config.training.batch_size, config.channels, *config.image_size]
    return [
        {
            "suite": "step", "case": case_name(config, dtype), "op": "train_step", "shape": shape,
            "dtype": dtype_name(step.dtype), "layout": layout_name(name), "impl": name, "phase": "step",
            **times[name]._asdict(), "images_per_s": shape[0] / times[name].median_ms * 1e3, "peak_bytes": peaks[name],
            "bytes": None, "copy_share": None, **gpu_columns(work[name], times[name].median_ms),
            "check": checks[name],
        }
        for name, step in steps.items()
    ]  # fmt: skip


def recorded(steps: dict[str, Step], say: Callable[[str], None]) -> dict[str, Step]:
    """Ours and the plain model's step as CUDA graphs, by name; a line for one that cannot be recorded."""
    from nvae_fast.benchmarks.graphs import Recorded

    found: dict[str, Step] = {}
    for name, of in (("ours:graph", "ours:auto"), ("eager_graph", "eager_channels_last")):
        try:
            found[name] = Recorded(steps[of])
        except Exception as error:  # of whatever refuses to be recorded
            say(f"  no row for {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return found


def case_name(config: NVAEConfig, dtype: torch.dtype) -> str:
    """The configuration's name, and the type unless that is float32."""
    return config.name if dtype == torch.float32 else f"{config.name}/{dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_name(impl: str) -> str:
    """Of a contender's images and weights."""
    return "contiguous" if impl in ("eager", "nvlabs") else "channels_last"
