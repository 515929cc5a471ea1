"""flow_cell: one half of a volume-preserving autoregressive flow cell. flow_cells: several, one after another.

`impl="auto"` takes "cpu" for float32 and bfloat16 tensors on the CPU, where the native code won wherever it was measured
(README.md beside this file), "triton" for float32, bfloat16 and float16 ones on CUDA where Triton is installed, else
"reference".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvae_fast.kernels import _check, _impl
from nvae_fast.kernels._norm import check_beside
from nvae_fast.kernels.flow_cell import ops, reference

_impl.register("flow_cell", cpu=ops.cpu_can_run, triton=ops.triton_can_run)


@_check.typed
def flow_cell(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor, *, impl: str = "auto") -> Tensor:
    """z - m(z), m = conv1x1(elu(elu(depthwise5x5(elu(conv3x3(z)))))) + bias, all padded to keep the size.

    The weights are the effective ones: already masked (`autoregressive_mask`, the first convolution strict) and
    normalised (`weight_norm`). Then m is strictly autoregressive and the log-determinant is 0. The op itself does not
    look at the masks: any weights are right, and their gradients are complete, those of masked entries too. The fused
    implementations find the taps of w_in and w_dw that are zero for all channels and skip them. The second ELU in a row
    is part of the published model.

    Args:
        z: [B, Z, H, W], any strides. The result has its shape and dtype; the arithmetic is float32 (float64 for
            float64).
        w_in: [E, Z, 3, 3]; w_dw: [E, 1, 5, 5]; w_out: [Z, E, 1, 1]; E is 6 Z in NVAE.
        bias_out: [Z].
        impl: "auto", "reference", "cpu" (float32 or bfloat16, also mixed; any strides) or "triton" (CUDA; float16 too). The
            reference alone can be differentiated twice.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not match.
        RuntimeError: an `impl` that cannot run on these tensors; a second derivative of the native implementation.

    Source: NVAE, arXiv 2007.03898, section 3.4; van den Oord et al., arXiv 1601.06759 (masks).
    """
    return _run(z, ["w_in", "w_dw", "w_out", "bias_out"], [w_in, w_dw, w_out, bias_out], impl)


@_check.typed
def flow_cells(
    z: Tensor,
    w_in: Sequence[Tensor],
    w_dw: Sequence[Tensor],
    w_out: Sequence[Tensor],
    bias_out: Sequence[Tensor],
    *,
    impl: str = "auto",
) -> Tensor:
    """z = flow_cell(z, w_in[k], w_dw[k], w_out[k], bias_out[k]) for k = 0, 1, ...: a flow, whole.

    The numbers are those of one call after another, whose backward passes are one node of autograd here.

    Args:
        z, impl: as in `flow_cell`, which also says what is computed.
        w_in, w_dw, w_out, bias_out: lists of one length, an entry a cell, each as in `flow_cell`, all of the same sizes and
            dtypes as those of the first cell. Without entries z is returned.

    Raises:
        As `flow_cell`, ValueError also for lists of different lengths, TypeError for dtypes that differ along a list.
    """
    lists = {"w_in": w_in, "w_dw": w_dw, "w_out": w_out, "bias_out": bias_out}
    if len({len(ws) for ws in lists.values()}) > 1:
        found = ", ".join(f"{len(ws)} {name}" for name, ws in lists.items())
        raise ValueError(f"{found}: expected one of each for every cell")
    names = [f"{name}[{k}]" for k in range(len(w_in)) for name in lists]
    return _run(z, names, [w for cell in zip(*lists.values(), strict=True) for w in cell], impl)


def _run(z: Tensor, names: Sequence[str], weights: Sequence[Tensor], impl: str) -> Tensor:
    """Of the cells that have `weights`, four each."""
    if z.dim() != 4 or not z.is_floating_point():
        raise ValueError(f"z of shape {tuple(z.shape)} and {z.dtype}: expected a floating-point [B, Z, H, W]")
    if not weights:
        return z
    channels, hidden = z.shape[1], weights[0].shape[0] if weights[0].dim() else 0
    shapes = (hidden, channels, 3, 3), (hidden, 1, 5, 5), (channels, hidden, 1, 1), (channels,)
    for i, (name, t) in enumerate(zip(names, weights, strict=True)):
        if t.shape != shapes[i % 4]:
            raise ValueError(f"{name} of shape {tuple(t.shape)}: expected {shapes[i % 4]} for z of {channels} channels")
        if t.dtype != weights[i % 4].dtype:
            raise TypeError(f"{name} is {t.dtype}: expected {weights[i % 4].dtype}, as {names[i % 4]}")
    check_beside(z, called="z", **dict(zip(names, weights, strict=True)))
    if _impl.resolve_impl("flow_cell", impl, z, *weights) == "reference":
        return reference.flow_cells(z, weights)
    return ops.FlowCells.apply(z, *weights)
