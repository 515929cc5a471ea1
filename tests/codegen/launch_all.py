"""Program of test_launch: two training steps and a batch of samples whose Triton kernels are specialised, compiled and launched
as on a GPU, on a driver that runs none of them (driver.c). Prints how often which was launched; stops at one that was given
other numbers than its launcher gave."""

from __future__ import annotations

import ctypes
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, KernelInterface

from nvae_fast import NVAE, PRESETS
from nvae_fast.benchmarks import launches
from nvae_fast.folding import folded
from nvae_fast.sampling import draw

BYTES = {"u64": 8, "f64": 8, "u32": 4, "f32": 4, "u16": 2, "u8": 1}
SMALL = dict(image_size=(16, 16), min_groups_per_scale=1, num_groups_per_scale=2, num_channels_enc=8, num_channels_dec=8,
             num_latent_per_group=4)  # fmt: skip
library = ctypes.CDLL("libcuda.so.1")
launched = ctypes.c_long.in_dll(library, "launches")
count = ctypes.c_int.in_dll(library, "parameters")
sizes = (ctypes.c_int * 256).in_dll(library, "sizes")
values = (ctypes.c_ulonglong * 256).in_dll(library, "values")
names: Counter[str] = Counter()
run, subscript = JITFunction.run, KernelInterface.__getitem__


class Driver(nvidia.CudaDriver):
    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0
        self.set_current_device, self.get_device_capability = lambda device: None, lambda device=0: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@cache
def parameters_of(ptx: str) -> list[int]:
    """The bytes of each parameter."""
    return [BYTES[kind] for kind in re.findall(r"\.param \.(\w+)[^\n]*_param_\d+", ptx.split(")")[0])]


def flat(value: object) -> Iterator[object]:
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from flat(v)
    else:
        yield value


def number(value: object) -> tuple[int, int]:
    """The bytes of an argument and, as an integer, their value."""
    if isinstance(value, torch.Tensor):
        return 8, value.data_ptr()
    if isinstance(value, float):
        return 4, struct.unpack("<I", struct.pack("<f", value))[0]
    size = 4 if -(2**31) <= value < 2**31 else 8
    return size, value % 2 ** (8 * size)


def checked(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
    """Launches, and compares what the kernel was given with the arguments: but for None and 1, which are constants."""
    kernel, before = run(self, *args, grid=grid, warmup=True, **options), launched.value
    known = parameters_of(kernel.asm["ptx"])
    count.value, sizes[: len(known)] = len(known), known
    run(self, *args, grid=grid, warmup=False, **options)
    named = dict(zip(self.arg_names, args, strict=False)) | options
    given = [v for p in self.params if not p.is_constexpr for v in flat(named[p.name])]
    wanted = [number(v) for v in given if not (v is None or (isinstance(v, int) and v == 1))]
    got = list(zip(known, values[: len(known)], strict=True))
    # behind them are two scratches of Triton's own, which no kernel has
    if launched.value != before + 1 or got[: len(wanted)] != wanted or any(v for _, v in got[len(wanted) :]):
        sys.exit(f"{self.__name__} was given {got} for {wanted}, in {launched.value - before} launches")
    names[self.__name__] += 1
    return kernel


def first(self: Autotuner, *args: object, **options: object) -> object:
    """Without timing."""
    return self.fn.run(*args, **options, **self.configs[0].all_kwargs())


@contextmanager
def on_gpu() -> Iterator[None]:
    with launches.Launches().on_gpu(extension=False), patch.object(KernelInterface, "__getitem__", subscript):
        yield


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    JITFunction.run, Autotuner.run = checked, first
    config = replace(PRESETS["celeba64"], **SMALL)
    model = launches.channels_last(NVAE(config)).train().set_memory("low")
    step = launches.TrainingStep(model, launches._Decides(model), launches.SpectralState(), precision="bf16")
    images, one = torch.rand(2, config.channels, *config.image_size), torch.ones(())
    for _ in range(2):
        with on_gpu():
            step(images, rate=one, kl_coeff=one, norm_coeff=one)
    with on_gpu():
        draw(folded(launches.channels_last(NVAE(config)).eval()), None, 0.7, False, 2)
    print(json.dumps(names))
