"""Sampling from the prior, ours beside the same model in plain PyTorch: eval mode, the same noise, logits checked against
float64 before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvae_fast.benchmarks.plain import plain
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.steps import FORMATS, SECONDS, dtype_name, layout_name, lowered
from nvae_fast.benchmarks.suite import COMPILED, check
from nvae_fast.benchmarks.timing import gpu_columns, gpu_work, graphed, interleaved, peak_bytes
from nvae_fast.config import NVAEConfig
from nvae_fast.folding import folded
from nvae_fast.kernels._impl import use_impl
from nvae_fast.model import NVAE

if TYPE_CHECKING:
    from nvae_fast.benchmarks.nvlabs import Checkout

BATCH, TEMPERATURE = 16, 0.7
WARM = 3  # batches in training mode before, so that running statistics are not those of a new model


class Draw:
    """One contender: a call draws `batch` images' logits from noise that is given. Ours is folded before, as a run of several
    batches has it."""

    def __init__(self, model: nn.Module, noise: list[Tensor], impl: str, sample: Callable[..., Tensor] | None = None,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.model, self.noise, self.impl, self.dtype = model.eval(), noise, impl, dtype
        if sample is None:
            with lowered(noise[0].device, dtype):
                sample = (folded(model) if impl == "auto" else model).sample
        self.sample = sample

    def __call__(self) -> Tensor:
        with torch.no_grad(), use_impl(self.impl), lowered(self.noise[0].device, self.dtype):
            return self.sample(len(self.noise[0]), TEMPERATURE, self.noise)


def contenders(config: NVAEConfig, batch: int, device: torch.device) -> dict[str, Draw]:
    """Every contender by name, and "exact" in float64, of the same weights, statistics and noise."""
    torch.manual_seed(0)
    model = NVAE(config).to(device).train()
    with torch.no_grad(), use_impl("reference"):
        for _ in range(WARM):
            model(torch.rand(2, config.channels, *config.image_size, device=device))
    noise = [torch.randn(batch, *shape, device=device) for shape in config.latent_shapes]
    draws = {}
    for name, layout in FORMATS.items():
        own = copy.deepcopy(model).to(memory_format=layout)
        given = [t.contiguous(memory_format=layout) for t in noise]
        draws[name] = Draw(own, given, "auto") if name == "ours:auto" else Draw(plain(own), given, "reference")
    exact = plain(copy.deepcopy(model)).double()
    draws["exact"] = Draw(exact, [t.double() for t in noise], "reference")
    return draws


def compiled(eager: Draw, say: Callable[[str], None], name: str = "compile") -> Draw | None:
    """The plain model's sampling under torch.compile, in the mode that `COMPILED` has for the name; None where that fails."""
    torch.compiler.reset()
    model = copy.deepcopy(eager.model)
    draw = Draw(model, eager.noise, "reference", torch.compile(model.sample, mode=COMPILED[name]))
    try:
        draw()
    except Exception as error:  # of Dynamo, Inductor or the compiler it calls
        say(f"  no row for {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return draw


def check_all(draws: dict[str, Draw], exact: Draw) -> dict[str, dict[str, Any]]:
    """`check` of every contender against float64, the yardstick being the eager ones in the contender's type."""
    truth = [exact()]
    found: dict[str, list[Tensor]] = {name: [draw()] for name, draw in draws.items()}
    eager = [name for name in draws if name.startswith("eager")]
    plains = {torch.float32: [found[name] for name in eager]}
    for draw in draws.values():
        if draw.dtype not in plains:
            plains[draw.dtype] = [[Draw(draws[name].model, draw.noise, "reference", dtype=draw.dtype)()] for name in eager]
    return {name: check(found[name], plains[draw.dtype], truth) for name, draw in draws.items()}


def measure_sampling(
    config: NVAEConfig, *, rounds: int, device: torch.device, batch: int = BATCH, compilers: Sequence[str] = (),
    checkout: Checkout | None = None, say: Callable[[str], None] = print,
) -> list[Row]:  # fmt: skip
    """The rows of one configuration's sampling, ours first. On a GPU a call is a replay of its CUDA graph, where it has one;
    that of the published code of a `checkout` is the code as shipped."""
    draws = contenders(config, batch, device)
    exact = draws.pop("exact")
    rivals = {name: compiled(draws["eager_channels_last"], say, name) for name in compilers}
    rivals["nvlabs"] = checkout.draw(draws["ours:auto"], say) if checkout else None
    draws |= {name: draw for name, draw in rivals.items() if draw is not None}
    checks = check_all(draws, exact)
    on_cpu = device.type == "cpu"
    peaks = {name: None if on_cpu and name in COMPILED else peak_bytes(draw, device) for name, draw in draws.items()}
    work = {} if on_cpu else {name: gpu_work(draw) for name, draw in draws.items()}
    calls = {name: draw if on_cpu or name == "nvlabs" else graphed(draw) for name, draw in draws.items()}
    times = interleaved(calls, rounds=rounds, budget_s=SECONDS)
    shape = [batch, config.channels, *config.image_size]
    return [
        {
            "suite": "sampling", "case": f"sample/{config.name}/{batch}", "op": "sample", "shape": shape,
            "dtype": dtype_name(draw.dtype), "layout": layout_name(name), "impl": name, "phase": "sample",
            **times[name]._asdict(), "images_per_s": batch / times[name].median_ms * 1e3, "peak_bytes": peaks[name],
            "bytes": None, "copy_share": None, **gpu_columns(work.get(name), times[name].median_ms),
            "check": checks[name],
        }
        for name, draw in draws.items()
    ]  # fmt: skip
