"""Schemas of adamax. Native code and Triton's launchers register themselves for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.kernels._impl import native_predicate

# A layout is, for each parameter, where its record begins, then the records: first element, number of axes, sizes, strides.
torch.library.define("nvae_fast::adamax_place", "(Tensor flat, int begin, int[] size, int[] stride) -> Tensor")
torch.library.define("nvae_fast::adamax_squares", "(Tensor[] grads) -> Tensor")
# False where a parameter is not where the layout says; nothing is written then. `numbers` are those of the given parameters.
torch.library.define(
    "nvae_fast::adamax_step_",
    "(Tensor(a!)[] params, Tensor[] grads, int[] numbers, Tensor layout, Tensor(b!) param, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_inf, Tensor(e!)? ema, Tensor(f!) steps, Tensor? factor, Tensor? take, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, float ema_decay) -> bool",
)
# What reference.py defines, the gradients where autograd left them: `table` is that of `Arena._tabled`, param for its size.
torch.library.define("nvae_fast::adamax_flat_squares", "(Tensor param, Tensor table, Tensor rows) -> Tensor")
torch.library.define(
    "nvae_fast::adamax_flat_step_",
    "(Tensor(a!) param, Tensor table, Tensor(b!) exp_avg, Tensor(c!) exp_inf, Tensor(d!)? ema, Tensor(e!) steps, Tensor rows, "
    "Tensor active, Tensor lr, Tensor? factor, Tensor? take, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, float ema_decay) -> ()",
)


@torch.library.register_fake("nvae_fast::adamax_place")
def _place_shape(flat: Tensor, begin: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return flat.new_empty_strided(size, stride)


cpu_can_run = native_predicate("cpu", torch.float32)
