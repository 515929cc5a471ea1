"""A model for inference: its normalisations folded into one scale and shift a channel, its weights normalised, once for all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast.cells import ActConv, Cell, FactorizedReduce
from nvae_fast.errors import InputError
from nvae_fast.kernels import _auto, _impl, _norm
from nvae_fast.kernels.depthwise_conv.ops import raw_name
from nvae_fast.layers import BatchNormAct2d, InvertedResidual, MaskedConv2d, WeightNormConv2d, shared_effective_weights
from nvae_fast.layers.shared import PLACES, effective
from nvae_fast.model import NVAE, Draw

IDENTITY, SWISH = (_norm.ACTIVATIONS.index(act) for act in ("identity", "swish"))
AGAIN = "fold the model it was made from again (folding.folded)"


def folded(model: NVAE) -> FoldedNVAE:
    """`model`, in eval mode, as one that only infers: sample, decode, bottom_up, decode_posterior, forward. No gradients.

    A normalisation with running statistics is u = scale x + shift per channel. Both are computed once, and enter the
    convolution behind it as it reads x, or the residual sum: none costs a pass of its own, but for those with nothing but an
    activation before a padded convolution. They do not go into weights: none is rounded again, and padding adds zeros to what
    the convolution reads, as it should. Weight-normalised filters are kept normalised, channels-last.

    The convolutions of the branches share the memory of `model`'s; kept beside it are the normalised filters and 5 numbers a
    channel. Under autocast all weights are kept in its type, and it runs under the same autocast. Where `model`'s state changes
    afterwards, all use is an InputError; `stale` tells. A folded model stays itself.

    Raises InputError for a model in training mode, or with convolutions that are still to be initialised from data.
    """
    if isinstance(model, FoldedNVAE):
        model._check_fresh()
        return model
    if type(model) is not NVAE:
        raise InputError(f"a {type(model).__name__} cannot be folded: expected an NVAE, whose passes are known")
    if model.training:
        raise InputError("the model is in training mode, where statistics are the batch's: call model.eval() before folding it")
    if any(getattr(conv, "data_init_pending", False) for conv in model.convolutions()):
        raise InputError("convolutions of the model are still to be initialised from data: pass it a batch before folding it")
    with torch.no_grad(), shared_effective_weights(model.convolutions()):
        found = _copy(model)
    found._remember(model)
    return found


class FoldedNVAE(NVAE):
    """What `folded` returns."""

    _source: weakref.ref[NVAE]
    _seen: list[tuple[weakref.ref[Tensor], int]]
    _autocast: torch.dtype | None

    def _remember(self, model: NVAE) -> None:
        self._source, self._autocast = weakref.ref(model), _autocast_type(self.prior_ftr0)
        self._seen = [(weakref.ref(t), _version(t)) for t in (*model.parameters(), *model.buffers())]

    @property
    def stale(self) -> bool:
        """The state of the model it was made from is not what it was then, or autocast's type. Writes through `.data` are not
        seen."""
        if _autocast_type(self.prior_ftr0) != self._autocast:
            return True
        if self._source() is None:  # whose tensors nobody can write to through it
            return False
        return any((t := ref()) is None or _version(t) != version for ref, version in self._seen)

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        self._check_fresh()
        with torch.no_grad():
            return super().bottom_up(x)

    def _top_down(self, draw: Draw, batch: int) -> Tensor:
        self._check_fresh()
        with torch.no_grad():
            return super()._top_down(draw, batch)

    def _check_fresh(self) -> None:
        if self.stale:
            raise InputError(f"the model's weights or statistics, or autocast, have changed since it was folded: {AGAIN}")

    def convolutions(self) -> list[nn.Conv2d]:
        return []  # whose weights are still to be made ready for a pass

    def train(self, mode: bool = True) -> FoldedNVAE:
        if mode:
            raise InputError("a folded model cannot be trained: train the model it was made from, and fold that again")
        return self

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError(f"a folded model only infers, where it is and in its type: change, save or load another, then {AGAIN}")

    # .to and the like; saving; the objective, whose regularisers are functions of the weights
    _apply = state_dict = load_state_dict = save_pretrained = push_to_hub = loss = set_memory = _refuse


class _Norm(BatchNormAct2d):
    """`table` [5, C]: mean, var, 1/sigma, scale, shift as the native ops take them; None where there are none. It holds the
    offset, the bias that a convolution before leaves to it."""

    table: Tensor | None

    def forward(self, x: Tensor, stats: Tensor | None = None, *, offset: Tensor | None = None) -> Tensor:
        impl = _impl.resolve_impl("bn_act", _auto.choose("bn_act", "auto", [x]), x)
        if self.table is None or impl == "reference":
            return super().forward(x, stats, offset=offset)
        return torch.ops.nvae_fast.bn_act_fwd(x, self.table, _norm.ACTIVATIONS.index(self.act))


class _Branch(InvertedResidual):
    """Two ways through the same stages: the native 1x1 convolution normalises what it reads, and packs its weights first; a
    product of matrices wants that done before it, and is the faster one."""

    def branch(self, x: Tensor, *, defer: bool = True, return_means: bool = False) -> Tensor | tuple[Tensor | None, ...]:
        x, expand, depthwise, project = _norm.autocast(x, *(m.weight for m in (self.expand, self.depthwise, self.project)))
        tables = [bn.table for bn in (self.bn_in, self.bn_expand, self.bn_depthwise, self.bn_out)]
        impl = "reference"
        if tables[0] is not None and x.dtype == expand.dtype and self.depthwise.groups == self.depthwise.in_channels:
            impl = _auto.choose("inverted_residual", "auto", [x])
            impl = _impl.resolve_impl("inverted_residual", impl, x, depthwise)
        if impl == "reference":
            return super().branch(x, defer=defer, return_means=return_means)
        raw = torch.ops.nvae_fast
        convolve = _product if impl == "cpu" and multiplies(x) else _pointwise
        t, _ = convolve(x, tables[0], IDENTITY, expand, False)
        sizes = self.depthwise.stride[0], 1, 2 if self.upsample else 1
        t, _ = getattr(raw, f"{raw_name(impl)}_fwd")(t, tables[1], SWISH, depthwise, *sizes, False)
        t, means = convolve(t, tables[2], SWISH, project, return_means)
        return (t, tables[3], means)[: 2 + return_means] if defer else raw.bn_act_fwd(t, tables[3], IDENTITY)


def multiplies(x: Tensor) -> bool:
    """Whether products of matrices win on the CPU for a branch that reads x: where packing the weights, or bfloat16, weighs
    more than the passes that they need (measured on AVX-512, one thread: by up to 1.9 and 2.9 times)."""
    channels = x.shape[1]
    return channels >= 32 if x.dtype == torch.bfloat16 else x.numel() < 4 * channels**2


def _pointwise(x: Tensor, table: Tensor, act: int, weight: Tensor, means: bool) -> tuple[Tensor, Tensor]:
    """(y, its means over space where they are wanted)"""
    return torch.ops.nvae_fast.pointwise_conv_fwd(x, table, act, weight, False, means)[::2]


def _product(x: Tensor, table: Tensor, act: int, weight: Tensor, means: bool) -> tuple[Tensor, None]:
    rows = torch.ops.nvae_fast.bn_act_fwd(x, table, act).permute(0, 2, 3, 1)
    return tf.linear(rows, weight.flatten(1)).permute(0, 3, 1, 2), None


class _ActConv(ActConv):
    def forward(self, x: Tensor, *, offset: Tensor | None = None) -> Tensor:
        x = tf.elu(x) if self.bn is None else self.bn(x, offset=offset)
        if self.upsample:
            x = tf.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)

    def fused(self, x: Tensor) -> bool:
        return False  # its BN is a table


class _Reduce(FactorizedReduce):
    """Its four convolutions, put together once."""

    def filters(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


def _copy(module: nn.Module) -> Any:
    """A copy of a module and its children that infers, with tensors that share memory and want no gradient."""
    kind, fold = FOLDS.get(type(module), (type(module), None))
    new = kind.__new__(kind)
    state = {**module._parameters, **module._buffers}
    vars(new).update(vars(module), _parameters={}, _buffers={n: _detached(t) for n, t in state.items()},
                     _modules={n: None if child is None else _copy(child) for n, child in module._modules.items()})  # fmt: skip
    if fold is not None:
        fold(new, module)
    return new


def _fold_norm(new: _Norm, bn: BatchNormAct2d, offset: Tensor | None = None) -> None:
    parts = _norm.tensors(bn.norm._replace(offset=offset))
    new._buffers["table"] = None
    if parts.stats is not None and _impl.resolve_impl("bn_act", "auto", parts.stats) != "reference":
        new._buffers["table"] = _norm.coefficients(parts.stats[None, :, :, None], parts, _norm.config(bn.norm))[0]


def _fold_cell(new: Cell, cell: Cell) -> None:
    for op, behind, folded in zip(cell.ops, cell.ops[1:], new.ops[1:], strict=False):
        if isinstance(op, ActConv) and not op.conv.adds_bias:
            _fold_norm(folded.bn, behind.bn, op.conv.bias)


def _fold_weights(new: nn.Conv2d, conv: nn.Conv2d) -> None:
    weight, bias = (effective(conv, name) for name in ("weight", "bias"))
    for place in PLACES.values():
        vars(new).pop(place, None)
    vars(new)["_buffers"] = {"weight": _detached(weight), "bias": _detached(bias)}


def _fold_normalised(new: nn.Conv2d, conv: WeightNormConv2d) -> None:
    _fold_weights(new, conv)
    new._buffers["effective"] = new._buffers.pop("weight").contiguous(memory_format=torch.channels_last)


def _fold_branch(new: _Branch, branch: InvertedResidual) -> None:
    weight = new.depthwise.weight
    if weight.shape[1] == 1 and _impl.resolve_impl("depthwise_conv", "auto", weight, weight) == "triton":
        # pixel by pixel, as the kernel reads the filters: or each call would copy them
        new.depthwise.register_buffer("weight", weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))


def _fold_reduce(new: _Reduce, module: FactorizedReduce) -> None:
    weight, bias = module.filters()
    vars(new)["_modules"] = {}
    vars(new)["_buffers"] = {"weight": weight.contiguous(memory_format=torch.channels_last), "bias": bias}


FOLDS: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any, Any], None] | None]] = {
    NVAE: (FoldedNVAE, None),
    BatchNormAct2d: (_Norm, _fold_norm),
    nn.Conv2d: (nn.Conv2d, _fold_weights),
    WeightNormConv2d: (WeightNormConv2d, _fold_normalised),
    MaskedConv2d: (MaskedConv2d, _fold_normalised),
    InvertedResidual: (_Branch, _fold_branch),
    ActConv: (_ActConv, None),
    Cell: (Cell, _fold_cell),
    FactorizedReduce: (_Reduce, _fold_reduce),
}
"""What a module of a folded model is an instance of, and what is done to it."""


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _autocast_type(t: Tensor) -> torch.dtype | None:
    kind = t.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors have none
