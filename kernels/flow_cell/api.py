"""flow_cell: one half of a volume-preserving autoregressive flow cell.

`impl="auto"` takes "cpu" for float32 and bfloat16 tensors on the CPU, where the native code won wherever it was measured
(README.md beside this file), "triton" for float32, bfloat16 and float16 ones on CUDA where Triton is installed, else
"reference".
"""

from __future__ import annotations

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
    if z.dim() != 4 or not z.is_floating_point():
        raise ValueError(f"z of shape {tuple(z.shape)} and {z.dtype}: expected a floating-point [B, Z, H, W]")
    channels, hidden = z.shape[1], w_in.shape[0] if w_in.dim() else 0
    expected = {
        "w_in": (w_in, (hidden, channels, 3, 3)),
        "w_dw": (w_dw, (hidden, 1, 5, 5)),
        "w_out": (w_out, (channels, hidden, 1, 1)),
        "bias_out": (bias_out, (channels,)),
    }
    for name, (t, shape) in expected.items():
        if t.shape != shape:
            raise ValueError(f"{name} of shape {tuple(t.shape)}: expected {shape} for z of {channels} channels")
    check_beside(z, beside="z", w_in=w_in, w_dw=w_dw, w_out=w_out, bias_out=bias_out)
    if _impl.resolve_impl("flow_cell", impl, z, w_in, w_dw, w_out, bias_out) == "reference":
        return reference.flow_cell(z, w_in, w_dw, w_out, bias_out)
    return ops.FlowCell.apply(z, w_in, w_dw, w_out, bias_out)
