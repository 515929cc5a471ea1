"""Sampling from the prior, ours beside the same model in plain PyTorch: eval mode, the same noise, logits checked against
float64 before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvae_fast.benchmarks.plain import plain
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.steps import FORMATS, SECONDS
from nvae_fast.benchmarks.suite import check
from nvae_fast.benchmarks.timing import graphed, interleaved, launches, peak_bytes
from nvae_fast.config import NVAEConfig
from nvae_fast.kernels._impl import use_impl
from nvae_fast.model import NVAE
from nvae_fast.sampling import passes

BATCH, TEMPERATURE = 16, 0.7
WARM = 3  # batches in training mode before, so that running statistics are not those of a new model


class Draw:
    """One contender: a call draws `batch` images' logits from noise that is given."""

    def __init__(self, model: NVAE, noise: list[Tensor], impl: str, sample: Callable[..., Tensor] | None = None) -> None:
        self.model, self.noise, self.impl = model.eval(), noise, impl
        self.sample = model.sample if sample is None else sample

    def __call__(self) -> Tensor:
        with torch.no_grad(), use_impl(self.impl):
            if self.impl == "auto":
                with passes(self.model):
                    return self.sample(len(self.noise[0]), TEMPERATURE, self.noise)
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


def compiled(eager: Draw, say: Callable[[str], None]) -> Draw | None:
    """The plain model's sampling under torch.compile; None where that fails."""
    torch.compiler.reset()
    model = copy.deepcopy(eager.model)
    draw = Draw(model, eager.noise, "reference", torch.compile(model.sample))
    try:
        draw()
    except Exception as error:  # of Dynamo, Inductor or the compiler it calls
        say(f"  no row for compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return draw


def measure_sampling(config: NVAEConfig, *, rounds: int, device: torch.device, batch: int = BATCH, compile_too: bool = True,
                     say: Callable[[str], None] = print) -> list[Row]:  # fmt: skip
    """The rows of one configuration's sampling, ours first. On a GPU a call is a replay of its CUDA graph, where it has one."""
    draws = contenders(config, batch, device)
    rival = compiled(draws["eager_channels_last"], say) if compile_too else None
    if rival is not None:
        draws["compile"] = rival
    truth = [draws.pop("exact")()]
    numbers = {name: [draw()] for name, draw in draws.items()}
    plains = [found for name, found in numbers.items() if name.startswith("eager")]
    checks = {name: check(found, plains, truth) for name, found in numbers.items()}
    on_cpu = device.type == "cpu"
    peaks = {name: None if on_cpu and name == "compile" else peak_bytes(draw, device) for name, draw in draws.items()}
    counts = {} if on_cpu else {name: launches(draw) for name, draw in draws.items()}
    calls: dict[str, Any] = dict(draws) if on_cpu else {name: graphed(draw) for name, draw in draws.items()}
    times = interleaved(calls, rounds=rounds, budget_s=SECONDS)
    shape = [batch, config.channels, *config.image_size]
    return [
        {
            "suite": "sampling", "case": f"sample/{config.name}/{batch}", "op": "sample", "shape": shape, "dtype": "float32",
            "layout": "contiguous" if name == "eager" else "channels_last", "impl": name, "phase": "sample",
            **times[name]._asdict(), "images_per_s": batch / times[name].median_ms * 1e3, "peak_bytes": peaks[name],
            "bytes": None, "copy_share": None, "launches": counts.get(name), "check": checks[name],
        }
        for name in draws
    ]  # fmt: skip
