"""Compiles every Triton kernel to PTX and machine code, without a GPU: `python compile_all.py` prints a JSON row for each.

C = 192, storage float32 or float16; pointers and C are declared divisible by 16, as Triton finds them at run time.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from ptx import joins, widths
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from nvae_fast.kernels.conv2d import _plan as conv2d
from nvae_fast.kernels.pointwise_conv import triton as pointwise

MODULES = "_join", "adamax.triton", "bn_act.triton", "bn_act.tables", "depthwise_conv.triton", "pointwise_conv.triton"
MODULES += "se_residual.triton", "residual_normal.triton", "residual_normal._log_prob", "residual_normal._sample"
MODULES += "conv2d.triton", "logistic_mixture.triton", "logistic_mixture._sample"
MODULES += "flow_cell.triton", "power_iteration.triton", "shared_weights.triton", "weight_norm.triton"
STORED = {
    f"{t}_ptr" for t in ("g", "w", "x", "y", "dy", "dx", "du", "skip", "also", "also2")
}  # images; every other pointer is a float32 table
STORED |= {f"{d}{t}_ptr" for t in ("z", "mu_q", "log_sigma_q", "mu_p", "log_sigma_p", "params") for d in ("", "d", "also_")}
STORED |= {"a_ptr", "map_ptr", "h1_ptr", "addend_ptr", "beside_ptr", "dbeside_ptr"}
KINDS = {
    "tickets_ptr": "i32",
    "dtickets_ptr": "i32",
    "rows_ptr": "i32",
    "batches_ptr": "i64",
    "active_ptr": "i1",
    "take_ptr": "i1",
    "lr_ptr": "fp64",
    "squares_ptr": "fp64",
    "total_ptr": "fp64",
}
REALS = {"sign", "weight", "beta2", "decay", "ema_weight"}
REALS |= {"eps", "share", "rate", "unbiased", "inverse", "residual_scale", "half_bin", "log_bin", "top_level"}
REALS |= {"temperature", "factor"}
CONSTANTS = dict(ACT=1, WIDE=False, RESIDUAL=True, TAPS=5, STRIDE=1, UP=1, BLOCK=2048)
CONSTANTS |= dict(AVERAGE=True, BIAS=False, C_ROWS=3, LOG_BETA1=-0.1, NEAR=True, DECAY=True, TERMS=False)
CONSTANTS |= dict(BLOCK_M=32, BLOCK_C=64, BLOCK_K=32, BLOCK_T=32, BLOCK_N=8, BLOCK_W=16, BLOCK_H=16)
JOIN = "parts_ptr", "tickets_ptr"
TASKS = "dparts_ptr", "dtickets_ptr", "DTASKS", "DGROUP"  # several, of a weight's gradient
NORM = {  # the normalisation that follows, a tuple; strides of 1 are constants
    **dict.fromkeys(("weight_ptr", "bias_ptr", "offset_ptr", "mean_ptr", "var_ptr"), "*fp32"),
    **{"batches_ptr": "*i64", "eps": "fp32", "rate": "fp32", "unbiased": "fp32"},
    **dict.fromkeys(("MEAN_STRIDE", "VAR_STRIDE"), "constexpr"),
}
GATE = "means_ptr", "w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr"
DGATE = "dw1_ptr", "db1_ptr", "dw2_ptr", "db2_ptr"
SUMS = "dkl_ptr", "dlog_q_ptr", "dlog_p_ptr"
PRIOR, ALSO = ("mu_p_ptr", "log_sigma_p_ptr"), ("also_mu_p_ptr", "also_log_sigma_p_ptr")
LAYOUTS = {  # of kernels that take any strides, by their prefix: 20 latent channels; three colours and 10 mixtures
    "residual_normal": [
        dict(layout="channels-last", in_z=1, noise_p=1, out_z=1, z_z=1, dz_z=1, also_z=1, G=20, STEP=25, BLOCK=512, BLOCK_P=32,
             BLOCK_G=32),
        dict(layout="planar", in_p=1, noise_p=1, out_p=1, z_p=1, dz_p=1, also_p=1, G=1, STEP=512, BLOCK=512, BLOCK_P=512,
             BLOCK_G=1),
    ],
    "logistic_mixture_sample": [
        dict(layout="channels-last", params_c=1, mixture_p=1, logistic_p=1, C=3, M=10, BLOCK_P=128),
        dict(layout="planar", params_p=1, mixture_p=1, logistic_p=1, C=3, M=10, BLOCK_P=128),
    ],
    "logistic_mixture": [
        dict(layout="channels-last", x_p=1, params_c=1, out_c=1, C=3, M=10, BLOCK_P=32, BLOCK_M=16),
        dict(layout="planar", x_p=1, params_p=1, out_p=1, C=3, M=10, BLOCK_P=32, BLOCK_M=16),
    ],
}  # fmt: skip
ABSENT = {  # which pointers a launcher may leave out; and the sizes that are 1 then, which Triton makes constants
    "bn_act_coefficients_kernel": [("weight_ptr", "offset_ptr"), ("weight_ptr", "bias_ptr"), ("mean_ptr", "var_ptr")],
    "bn_act_stats_kernel": [("norm",), ("offset_ptr", "batches_ptr")],
    "bn_act_fwd_kernel": [("w_ptr", "taps_ptr")],
    "bn_act_bwd_kernel": [("also2_ptr",), ("also_ptr", "also2_ptr")],
    "bn_act_affine_kernel": [("also2_ptr",), ("also_ptr", "also2_ptr")],
    "conv2d_fwd_kernel": [("means_ptr",), ("parts_ptr", "norm"), (*JOIN, "norm", "means_ptr"), ("bn_ptr", "map_ptr")],
    "conv2d_du_kernel": [("c_ptr", "y_ptr", "map_ptr", "g_ptr"), ("bn_ptr", "a_ptr", *JOIN)],
    "conv2d_dweight_kernel": [JOIN],
    "depthwise_conv_fwd_kernel": [("norm",), ("parts_ptr", "norm")],
    "depthwise_conv_bwd_kernel": [("bn_ptr", "out_ptr", *JOIN)],
    "pointwise_conv_fwd_kernel": [
        ("means_ptr",),
        ("norm",),
        ("parts_ptr", "norm"),
        ("parts_ptr", "means_ptr", "norm"),
        ("bn_ptr", *JOIN, "means_ptr", "norm"),
    ],  # fmt: skip
    "pointwise_conv_bwd_kernel": [("y_ptr", "c_ptr"), ("bn_ptr", *JOIN), TASKS],
    "power_iteration_sweep_kernel": [("norms_ptr",), ("norms_ptr", "shares_ptr")],
    "power_iteration_finish_kernel": [("norms_ptr",)],
    "se_residual_gate_kernel": [("bn_ptr",), ("x_ptr", "tickets_ptr", "TASKS")],
    "se_residual_fwd_kernel": [
        ("norm",),
        (*JOIN, "bn_ptr"),
        GATE,
        (*GATE, "norm"),
        (*GATE, *JOIN),
        (*GATE, *JOIN, "bn_ptr"),
        (*GATE, *JOIN, "state_ptr"),
        (*GATE, *JOIN, "state_ptr", "bn_ptr"),
    ],  # fmt: skip
    "se_residual_dgate_kernel": [("bn_ptr",), ("w1_ptr", "w2_ptr", "tickets_ptr", "shares_ptr")],
    "se_residual_dy_kernel": [("bn_ptr", "also2_ptr"), ("norm_ptr", "du_ptr"), ("norm_ptr", "du_ptr", "also_ptr", "also2_ptr")],
    "se_residual_bwd_kernel": [
        ("bn_ptr", "dbn_ptr"),
        ("state_ptr", *DGATE),
        ("state_ptr", *DGATE, "bn_ptr", "dbn_ptr", "shares_ptr"),
    ],
    "residual_normal_fwd_kernel": [PRIOR, JOIN, ("bias_ptr",)],
    "residual_normal_bwd_kernel": [
        (*PRIOR, *ALSO, "dmu_p_ptr", "dlog_sigma_p_ptr", "dz_ptr"),
        (*SUMS, *ALSO),
        ALSO,
        ("bias_ptr", "dbias_ptr", *JOIN),
    ],
    "residual_normal_log_prob_fwd_kernel": [PRIOR, JOIN, (*PRIOR, *JOIN, "log_q_ptr")],
    "residual_normal_log_prob_bwd_kernel": [
        (*PRIOR, "dmu_p_ptr", "dlog_sigma_p_ptr"),
        ("dkl_ptr", "also_ptr"),
        ("dlog_p_ptr",),
    ],
    "adamax_sizes_kernel": [("take_ptr",)],
    "adamax_step_kernel": [("ema_ptr",), ("ema_ptr", "factor_ptr")],
}
PRODUCTS = {  # of tiles: the table of tiles, and which block is whose
    "pointwise_conv_fwd_kernel": (pointwise.FORWARD, ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    "pointwise_conv_bwd_kernel": (
        pointwise.BACKWARD,
        ("BLOCK_M", "BLOCK_K", "BLOCK_N", "WEIGHT_N", "WEIGHT_K", "WEIGHT_M"),
    ),
    "conv2d_fwd_kernel": (conv2d.TILES, ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    "conv2d_du_kernel": (conv2d.TILES, ("BLOCK_M", "BLOCK_K", "BLOCK_N")),
    "conv2d_dweight_kernel": (conv2d.DWEIGHT, ("BLOCK_N", "BLOCK_K", "BLOCK_M")),
}
LARGEST = {("pointwise_conv_fwd_kernel", 128): ("beside_ptr",)}  # what a launcher leaves out at its largest tile
APART = {  # what is not there behind a normalisation, and what without one; all others leave nothing out
    "pointwise_conv_fwd_kernel": [("bias_ptr", "addend_ptr", "beside_ptr"), ("bn_ptr", "means_ptr")],
    "pointwise_conv_bwd_kernel": [("beside_ptr", "dbeside_ptr", "also_ptr", "dbias_ptr"), ("y_ptr", "c_ptr", "bn_ptr", *JOIN)],
}
TYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
SHARED = dict(RESULT=tl.bfloat16, GIVEN=tl.bfloat16, TERMS=True)  # for all that a pass under autocast computes with
FIXED = {  # what the one launcher of a kernel says, by the first letters of its name
    "conv2d": dict(SHARES=1, DILATION=1, DEPTH=192, SPACE=192, TILE_W=8, PITCH_A=192, PITCH_G=192),
    "conv2d_dweight": dict(H=32, W=32),
    "flow_cell": dict(PITCH=128, TILE_N=1, TILE_H=16, TILE_W=16, BLOCK_E=32, BLOCK_H=64, BLOCK_Z=32, BLOCK_K=32, num_warps=8),
    "power_iteration": dict(BLOCK=1024, BLOCK_R=256, BLOCK_K=32, BLOCK_T=16, BLOCK_C=256, num_warps=16),
    "power_iteration_join": dict(num_warps=8),
    "power_iteration_finish": dict(num_warps=4),
    "shared_weights": SHARED,
    "se_residual_fwd": dict(num_warps=8, BLOCK_W=128),
    "se_residual_gate": dict(BLOCK_W=128),
    **{f"se_residual_{name}": dict(BLOCK_W=128) for name in ("dgate", "dy")},
    "weight_norm": dict(BLOCK_R=2, BLOCK_K=1024, NORM=tl.float32),
}
OTHERS = {  # than CONSTANTS say; of products, at their largest tile
    "conv2d_fwd_kernel": [dict(SHARES=4, TILE_W=16, WHOLE=False)],
    "conv2d_du_kernel": [dict(SHARES=4, TILE_W=16)],
    "depthwise_conv_fwd_kernel": [{}, dict(STRIDE=2), dict(UP=2)],
    "depthwise_conv_bwd_kernel": [dict(BLOCK_T=8, BLOCK_D=8) | more for more in ({}, dict(STRIDE=2), dict(UP=2))],
    **{f"se_residual_{name}_kernel": [{}, dict(BIAS=True)] for name in ("gate", "fwd", "dgate", "dy", "bwd")},
    "weight_norm_fwd_kernel": [{}, SHARED],
    "weight_norm_bwd_kernel": [{}, SHARED],
}


def tiles(name: str, storage: str) -> list[dict]:
    """The constants and options that a launcher may choose, beside CONSTANTS."""
    said = [values for start, values in FIXED.items() if name.startswith(start)]
    fixed = dict(pair for values in said for pair in values.items())
    if name not in PRODUCTS:
        others = [fixed | values for values in OTHERS.get(name, [{}])]
        return next((found for prefix, found in LAYOUTS.items() if name.startswith(prefix)), others)
    table, order = PRODUCTS[name]
    rows = table[4 if storage == "fp32" else 2]
    found = [fixed | dict(zip((*order, "num_warps", "num_stages"), row, strict=False)) for row in rows]
    found = [tile | {"WHOLE": tile is found[0]} for tile in found]  # means at the largest tile: where it is of one image
    return [found[0] | values for values in OTHERS.get(name, [])] + found


def compiled(name: str, kernel, storage: str = "fp32", arch: int = 90, absent: tuple = (), ones: bool = False,
             wide: bool = False, tile: dict | None = None, unit: int = 16):  # fmt: skip
    """`absent` pointers are None and sizes 1; `ones`: integers are 1, which Triton makes constants; `wide`: 64-bit offsets and
    sizes; `unit`: that C, K and N are multiples of is said by UNIT, UNIT_K and UNIT_N alone."""
    tile = tiles(name, storage)[-1] if tile is None else tile
    names = kernel.arg_names
    constants = (
        CONSTANTS
        | (dict(PRECISION="tf32", PIXELS=64) if storage == "bf16" else dict(PRECISION="bf16x6", PIXELS=32))
        | dict.fromkeys(("RESULT", "GIVEN"), TYPES[storage])
        | tile
        | {"WIDE": wide, "STORED": TYPES[storage]}
        | {n: None if n.endswith("_ptr") else 1 for n in absent if n != "norm"}
        | dict.fromkeys(("UNIT", "UNIT_K", "UNIT_B", "UNIT_N"), 1 if ones else unit)
    )
    multiples = ("C", "K", "B", "N", "WIDTH", "ELEMENTS", "SPAN") if unit == 16 else ()
    kinds = {}
    for n in names:
        pointed = storage if n in STORED else KINDS.get(n, "fp32")
        kinds[n] = f"*{pointed}" if n.endswith("_ptr") else "fp32" if n in REALS else "i32"
        if n.endswith("_table"):
            kinds[n] = "*i64"
        if n == "norm":
            kinds[n] = "tuple"
        if n in ("M", "P", "ELEMENTS", "ROWS") and wide:
            kinds[n] = "i64"
        if ones and kinds[n] == "i32":
            constants.setdefault(n, 1)
        if n in constants:
            kinds[n] = "constexpr"
    if "layout" in tile:
        multiples += "P", "CHUNK", *(n for n in names if n.endswith(("_b", "_c", "_z")))  # not a pixel's: 40 or 100 values
    divisible = [(i,) for i, n in enumerate(names) if n not in constants and (kinds[n][0] == "*" or n in multiples)]
    fixed = {(names.index(n),): v for n, v in constants.items() if n in names}
    if "norm" in names:
        absent = *absent, *(NORM if "norm" in absent else ())
        fields = {n: "constexpr" if n in absent else kind for n, kind in NORM.items()}
        kinds["norm"] = tuple(fields.values())
        places = {n: (names.index("norm"), i) for i, n in enumerate(NORM)}
        fixed |= {places[n]: None if n in absent else 1 for n, kind in fields.items() if kind == "constexpr"}
        divisible += [places[n] for n, kind in fields.items() if kind[0] == "*"]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs=fixed,
        attrs={place: [["tt.divisibility", 16]] for place in divisible},
    )
    stages = tile.get("num_stages", 1 if name.startswith("flow_cell") else 3)
    options = dict(num_warps=tile.get("num_warps", 4), num_stages=stages)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = binary.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        # Triton's own: an assembler from elsewhere may refuse the PTX version
        target = re.search(r"[.]target (sm_[0-9a-z]+)", ptx)[1]
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", path, "-o", f"{path}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    images = [n for n in names if n in STORED]
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    return {
        "kernel": name,
        "storage": storage,
        "arch": arch,
        "images": [] if "layout" in tile else images,
        "layout": tile.get("layout"),
        "lists": "jobs_table" in names,
        "shares": tile.get("SHARES"),
        "loads": widths(ptx, "ld"),
        "stores": widths(ptx, "st"),
        "local": sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", said))) + ptx.count(".local"),
        "shared": binary.metadata.shared,
        "wgmma": len(products),
        "wgmma_registers": sum(bool(re.search(r"\}, *\{", p)) for p in products),  # whose left operand is in registers
        "joins": joins(ptx),
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
    }


if __name__ == "__main__":
    rows = []
    for module in MODULES:
        for name, kernel in vars(importlib.import_module(f"nvae_fast.kernels.{module}")).items():
            if name.startswith(module.strip("_").split(".")[0]) and name.endswith("_kernel"):
                kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
                kinds = ("fp32", "fp16") if {*STORED, "STORED"} & set(kernel.arg_names) else ("fp32",)
                if name.startswith("flow_cell"):  # whose products take seconds to compile
                    rows += [
                        compiled(name, kernel, *pair, unit=4)
                        for pair in (("fp32", 80), ("bf16", 80), ("fp32", 90), ("bf16", 90))
                    ]
                    rows.append(compiled(name, kernel, "bf16", ones=True, wide=True) | dict(ones=True, wide=True))
                    continue
                for storage in kinds:
                    for tile in tiles(name, storage):
                        for apart in APART.get(name, [()]):
                            left_out = *apart, *LARGEST.get((name, tile.get("BLOCK_M")), ())
                            without = dict(absent=left_out) if left_out else {}
                            rows += [compiled(name, kernel, storage, arch, tile=tile, **without) | without for arch in (80, 90)]
                others = [dict(absent=absent) for absent in ABSENT.get(name, [])] + [dict(ones=True)]
                others += [dict(wide=True)] if "WIDE" in kernel.arg_names else []
                others += [dict(unit=8, storage="fp16")] if {"UNIT", "UNIT_K"} & set(kernel.arg_names) else []
                if name in APART:
                    others = [o | dict(absent=(*o.get("absent", ()), *APART[name][0])) for o in others]
                rows += [compiled(name, kernel, **options) | options for options in others]
    print(json.dumps(rows))
