"""The CUDA sources of csrc/depthwise_conv, compiled by g++ against the emulator's headers: Python functions on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from nvae_fast.kernels._norm import Following
from nvae_fast.kernels.bn_act.ops import GRADIENTS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "depthwise_conv"
EMULATOR = Path(__file__).parent / "emulator"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g0", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-DNVAE_DEPTHWISE_BLOCKS=5", "-DNVAE_DEPTHWISE_GROUP=2"]  # so that a block has many tiles, and there are groups
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VARIANTS = {"auto": 0, "any": 1, "core": 2, "tensor": 3}


class Problem(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("c", ctypes.c_int64)] + [
        (name, ctypes.c_int)
        for name in ("h", "w", "out_h", "out_w", "kernel", "stride", "dilation", "up", "act", "storage", "variant")
    ]


class Next(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "offset", "mean", "var")]
    _fields_ += [("mean_stride", ctypes.c_int64), ("var_stride", ctypes.c_int64), ("mean_type", ctypes.c_int)]
    _fields_ += [("var_type", ctypes.c_int), ("batches", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_double) for name in ("eps", "rate", "unbiased")]


class Forward(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "bn", "weight", "y", "stats")]
    _fields_ += [("followed", ctypes.c_bool), ("next", Next), ("scratch", ctypes.c_void_p), ("tickets", ctypes.c_void_p)]


class Backward(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("dy", "y", "c", "x", "bn", "weight", "du", "dweight", "table")]
    _fields_ += [("share", ctypes.c_double), ("scratch", ctypes.c_void_p), ("tickets", ctypes.c_void_p)]


def compiler() -> str:
    return os.environ.get("CXX", "c++").split()[0]


def build(folder: Path, *flags: str, bfloat16: bool = True) -> Path:
    """The library, in `folder`; raises CalledProcessError with the compiler's words. Without `bfloat16` it knows two types."""
    units = [*sorted(SOURCES.glob("depthwise_cuda*.cu")), EMULATOR / "library.cpp"]
    if not bfloat16:
        units = [unit for unit in units if unit.stem != "depthwise_cuda_bf16"]
        flags = (*flags, "-DWITHOUT_BFLOAT16")
    include = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    objects = []
    for unit in units:
        objects.append(folder / f"{unit.stem}.o")
        command = [compiler(), *FLAGS, *flags, *include, "-c", str(unit), "-o", str(objects[-1])]
        subprocess.run(command, check=True, capture_output=True, text=True)
    library = folder / "libdepthwise.so"
    subprocess.run([compiler(), "-shared", *flags, *map(str, objects), "-o", str(library)], check=True, capture_output=True)
    return library


class Library:
    """`forward` and `backward` have the arguments of the schemas depthwise_conv_cuda_fwd and _bwd."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.why_not.restype = ctypes.c_char_p
        for name in ("forward_scratch", "backward_scratch", "tickets"):
            getattr(self.c, name).restype = ctypes.c_int64
        self.ran: list[str] = []
        self.tickets = torch.zeros(1 << 10, dtype=torch.int32)

    def _problem(self, x, weight, stride, dilation, upsample, act, variant) -> Problem:
        n, c, h, w = x.shape
        out = [(side * upsample - 1) // stride + 1 for side in (h, w)]
        dilation = min(dilation, max(h * upsample, w * upsample, 1))
        sizes = (h, w, *out, weight.shape[-1], stride, dilation, upsample, act, STORAGE[x.dtype], variant)
        return Problem(n, c, *sizes)

    def _run(self, kind: str, problem: Problem, arguments: ctypes.Structure) -> None:
        refusal = self.c.why_not(ctypes.byref(problem))
        assert refusal is None, refusal
        both = ctypes.byref(problem), ctypes.byref(arguments)
        scratch = torch.empty(getattr(self.c, f"{kind}_scratch")(*both))
        assert self.tickets.numel() >= self.c.tickets(ctypes.byref(problem))
        arguments.scratch, arguments.tickets = scratch.data_ptr(), self.tickets.data_ptr()
        self.ran.append(list(VARIANTS)[getattr(self.c, f"{kind}_variant")(*both)])
        error = getattr(self.c, kind)(*both)
        if error:
            raise RuntimeError(f"cuda error {error}")
        assert not self.tickets.any(), "tickets are left zero"

    def depthwise_conv_cuda_fwd(self, tickets: Tensor, *args, **options) -> tuple[Tensor, ...]:
        """With the caller's tickets: the schema `_counted`."""
        self.tickets = tickets
        return self.forward(*args, **options)

    def depthwise_conv_cuda_bwd(self, tickets: Tensor, *args, **options) -> tuple[Tensor, ...]:
        self.tickets = tickets
        return self.backward(*args, **options)

    def forward(self, x, bn, act, weight, stride, dilation, upsample, stats, *following, variant=0) -> tuple[Tensor, Tensor]:
        n = Following(*following)
        x, weight = dense(x), weight.contiguous()
        problem = self._problem(x, weight, stride, dilation, upsample, act, variant)
        y = empty(x, problem.n, problem.c, problem.out_h, problem.out_w)
        found = torch.zeros(n.rows(stats), problem.c)
        count, running = y.numel() / problem.c, (n.running_mean, n.running_var)
        if not y.numel() and len(found) == 5:
            eps, rate, _ = n.numbers
            found = torch.ops.nvae_fast.bn_act_coefficients(
                torch.zeros(2, problem.c), n.weight, n.bias, eps, *running, n.batches, rate, 0.0, n.offset
            )
        if y.numel():
            eps, rate, copies = n.numbers or (0.0, 0.0, 1.0)
            strides, types = ([0 if t is None else of(t) for t in running] for of in (stride_of, type_of))
            tensors = map(pointer, (n.weight, n.bias, n.offset, *running))
            moved = count * copies / max(count * copies - 1, 1)
            behind = Next(*tensors, *strides, *types, pointer(n.batches), eps, rate, moved)
            images = map(pointer, (x, bn, weight, y, found if stats else None))
            self._run("forward", problem, Forward(*images, len(found) == 5, behind))
        return y, found

    def backward(
        self, dy, y, c, x, bn, act, weight, stride, dilation, upsample, count=0.0, variant=0
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, y, x, weight = dense(dy), None if y is None else dense(y), dense(x), weight.contiguous()
        problem = self._problem(x, weight, stride, dilation, upsample, act, variant)
        du, dweight = empty(x, *x.shape), torch.zeros_like(weight)
        table = torch.zeros(0 if bn is None else GRADIENTS, problem.c)
        tensors = (dy, y, c, x, bn, weight, du, dweight, None if bn is None else table)
        if dy.numel():
            self._run("backward", problem, Backward(*map(pointer, tensors), 1 / count if count else 0.0))
        return du, dweight, table


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def stride_of(t: Tensor) -> int:
    return t.stride(0)


def type_of(t: Tensor) -> int:
    return 4 if t.dtype == torch.float64 else STORAGE[t.dtype]


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
