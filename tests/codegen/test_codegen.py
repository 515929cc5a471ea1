"""What Triton makes of the kernels for sm_80 and sm_90, compiled here without a GPU: wide accesses, nothing in local memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PRODUCTS = tuple(f"pointwise_conv_{name}_kernel" for name in ("fwd", "bwd"))
TAPS = tuple(f"conv2d_{name}_kernel" for name in ("fwd", "du", "dweight"))

JOINING = {f"bn_act_{name}_kernel" for name in ("stats", "sums")} | {"se_residual_fwd_kernel"}  # what their programs leave
JOINING |= {f"{op}_conv_{name}_kernel" for op in ("depthwise", "pointwise") for name in ("fwd", "bwd")} | {*TAPS}
JOINING |= {"residual_normal_bwd_kernel"}
OF_IMAGES = {f"se_residual_{name}_kernel" for name in ("gate", "dgate", "dy")}  # what the programs of an image leave
OF_IMAGES |= {"residual_normal_fwd_kernel", "residual_normal_log_prob_fwd_kernel"}
OF_IMAGES |= {"flow_cell_bwd_kernel"}  # of tiles


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> list[dict]:
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("triton is not installed: pip install 'triton>=3.6'")
    if not (Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this Triton comes without ptxas")
    # A process of its own: what the interpreter has decorated cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, Path(__file__).with_name("compile_all.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def pinned() -> bool:
    """Whether this is the Triton that these figures are of, which the tests run with."""
    return version("triton").startswith("3.7.")


def test_every_kernel_compiles_for_both_architectures(rows):
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == 43
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in kernels for arch in (80, 90)}


def test_images_are_read_and_written_16_bytes_at_a_time(rows):
    images = [row for row in rows if row["images"] and not row.get("ones") and not row["kernel"].startswith("flow_cell")]
    assert {row["storage"] for row in images} == {"fp32", "fp16"}
    for row in images:
        if row["kernel"] in (PRODUCTS[1], TAPS[1]) and not pinned():  # Triton 3.6 reads some of theirs 8 bytes at a time
            row["loads"].pop("64", 0)
        read = [name for name in row["images"] if name not in ("y_ptr", "dx_ptr", *row.get("absent", ()))]
        if row["kernel"].startswith("se_residual"):  # tables of images and of parameters
            for width in ("32", "64"):
                row["loads"].pop(width, 0), row["stores"].pop(width, 0)
        if "_conv_" in row["kernel"] or row["kernel"] in TAPS:  # tables, a value a thread: at most three of them, three times
            most = 34 if row["kernel"] == TAPS[2] else 18  # ahead; sums and tables out, a weight of rows of odd length
            assert row["loads"].pop("32", 0) <= 18 and row["stores"].pop("32", 0) <= most, row
        if row["kernel"] in (
            "bn_act_stats_kernel",
            "depthwise_conv_fwd_kernel",
            TAPS[0],
        ):  # the counter of the norm that follows
            assert row["loads"].pop("64", 0) <= 1 and row["stores"].pop("64", 0) <= 1, row
        if row["kernel"] == PRODUCTS[0]:  # the counter of the norm that follows; a bias, two values a thread
            most = 1 if "bias_ptr" in row["absent"] else 17
            assert row["loads"].pop("64", 0) <= most and row["stores"].pop("64", 0) <= 1, row
        if row["kernel"] in ("bn_act_sums_kernel", "bn_act_stats_kernel"):  # tables, of the last program
            assert row["loads"].pop("32", 0) <= 5, row
        taps = row["kernel"] in ("bn_act_fwd_kernel", "depthwise_conv_g_kernel")  # of a weight, value by value
        if taps and "w_ptr" not in row.get("absent", ()):
            row["loads"] = {"128": row["loads"]["128"]}
            row["stores"] = {"128": row["stores"]["128"]}
            read.remove("w_ptr")
        if row["kernel"] == "depthwise_conv_bwd_kernel":  # a tile of 8 pixels is 4 values a thread
            for widths in (w for w in (row["loads"], row["stores"]) if "64" in w):
                widths["128"] = widths.get("128", 0) + widths.pop("64")
        assert set(row["loads"]) == {"128"} and row["loads"]["128"] >= len(read), row
        if {"y_ptr", "dx_ptr", "du_ptr"} & set(row["images"]) - set(row.get("absent", ())):
            assert set(row["stores"]) == {"128"}, row


def test_parts_are_stored_before_a_ticket_is_drawn_and_read_from_where_all_programs_see_them(rows):
    """bar.sync, then an atomic that orders across the GPU, then loads past the first-level cache."""
    joining = [row for row in rows if row["joins"]]
    assert {row["kernel"] for row in joining} == JOINING | OF_IMAGES
    for row in joining:
        if row["kernel"] in OF_IMAGES:  # where tables that were there before the launch are read as well
            assert len(row["joins"]) == (3 if row["kernel"] == "flow_cell_bwd_kernel" else 1), row  # and of weights, in groups
            assert all(ticket["stored"] and ticket["ordered"] and ticket["past"] for ticket in row["joins"]), row
            continue
        absent = row.get("absent", ())
        each = 2 - row.get("ones", False)  # of a group's tasks, of all groups; of a single task
        tickets = each * ("parts_ptr" not in absent)
        if row["kernel"] == "depthwise_conv_bwd_kernel":  # and of the taps' tasks
            tickets += 1
        if row["kernel"] == "pointwise_conv_bwd_kernel" and "dparts_ptr" not in absent:  # of a weight's, for both inputs
            tickets += each * (1 if "beside_ptr" in absent else 2)
        if row["kernel"] in ("conv2d_fwd_kernel", "pointwise_conv_fwd_kernel"):  # and of an image's tiles
            tickets += "means_ptr" not in absent
        tickets += row["kernel"] in TAPS and row["shares"] > 1
        assert len(row["joins"]) == tickets, row
        assert all(all(ticket.values()) for ticket in row["joins"]), row


def test_products_of_tiles_take_their_left_operand_from_registers(rows):
    """What stands before a product is applied there: no way through shared memory (sm_90, 16-bit storage)."""
    products = [row for row in rows if row["kernel"] in PRODUCTS and row["arch"] == 90 and row["storage"] == "fp16"]
    products = [row for row in products if row["kernel"] == PRODUCTS[0] or "c_ptr" not in row["absent"]]
    assert {row["kernel"] for row in products} == set(PRODUCTS)
    for row in products:
        assert row["wgmma"] == row["wgmma_registers"] > 0, row


def test_products_over_taps_come_from_shared_memory_on_tensor_cores(rows):
    """What stands before them was applied to a map in memory, which is copied ahead without registers (16-bit storage)."""
    for row in rows:
        if row["kernel"] in TAPS and row["arch"] == 90 and row["storage"] == "fp16":
            assert row["wgmma"] > 0 == row["wgmma_registers"], row


def test_planes_are_read_and_written_four_values_at_a_time(rows):
    """Of the kernels that take any strides; channels-last, 20 or 10 channels are read value by value."""
    planes = [row for row in rows if row["layout"] == "planar" and not {"absent", "ones", "wide"} & set(row)]
    assert len(planes) == 32
    least = {  # images that it reads and writes, beside noise in float32
        "residual_normal_fwd": (4, 1), "residual_normal_bwd": (4, 4), "residual_normal_log_prob_fwd": (3, 0),
        "residual_normal_log_prob_bwd": (4, 3), "logistic_mixture_fwd": (4, 0), "logistic_mixture_bwd": (4, 4),
        "residual_normal_sample": (2, 1), "logistic_mixture_sample": (0, 0),  # a pixel to a lane
    }  # fmt: skip
    for row in planes:
        width, (read, written) = ("128", "64")[row["storage"] == "fp16"], least[row["kernel"].removesuffix("_kernel")]
        assert row["loads"].get(width, 0) >= read and row["stores"].get(width, 0) >= written, row


def test_hidden_maps_are_read_and_written_16_bytes_at_a_time(rows):
    """Those of flow_cell, whose images have too few channels for it."""
    hidden = [row for row in rows if "h1_ptr" in row["images"]]
    assert len(hidden) == 10 and all(row["loads"].get("128", 0) >= 5 and row["stores"].get("128", 0) >= 2 for row in hidden)


def test_aligned_rows_of_lists_are_read_and_written_16_bytes_at_a_time(rows):
    lists = [row for row in rows if row["lists"]]
    assert lists and all(row["loads"].get("128", 0) + row["stores"].get("128", 0) >= 4 for row in lists)


def test_adamax_reads_and_writes_an_arena_16_bytes_at_a_time(rows):
    for row in rows:
        if row["kernel"] == "adamax_step_kernel" and not row.get("ones"):
            assert row["loads"]["128"] >= 4 and set(row["stores"]) == {"128"}, row
        if row["kernel"] == "adamax_squares_kernel" and not row.get("ones"):
            assert row["loads"]["128"] == 4 and row["loads"].keys() == {"128", "64", "32"}, (
                row
            )  # others: whose a row is, and where


def test_nothing_spills_into_local_memory(rows):
    """But for a few values of depthwise_conv's backward on sm_80, doubled in float32, with stride 2 in 16 bits, and for the
    last programs of bn_act_stats, conv2d, pointwise_conv and se_residual, which finish a normalisation or a gate: ptxas prefers
    128 and 168, 72, 64 and 48 registers to more. `local` has the bytes of the stack, and of stores to it and loads. Triton
    3.6, 3.8 and 3.9 keep up to 128 bytes in these and a few more."""
    most = 0 if pinned() else 128
    stack = {("depthwise_conv_bwd_kernel", "fp32", 80): 56, ("depthwise_conv_bwd_kernel", "fp16", 80): 24}
    stack |= {("bn_act_stats_kernel", "fp16", 90): 16, ("se_residual_fwd_kernel", "fp32", 90): 16}
    stack["pointwise_conv_fwd_kernel", "fp32", 80] = 24
    stack["se_residual_dy_kernel", "fp32", 90] = 16  # with 64-bit offsets
    stack["residual_normal_bwd_kernel", "fp32", 90] = 16  # where nothing else reaches the prior
    stack |= {(TAPS[0], "fp16", 80): 44, (TAPS[0], "fp32", 80): 24, (TAPS[1], "fp16", 80): 48, (TAPS[1], "fp32", 80): 16}
    stack[TAPS[1], "fp32", 90] = 120
    spilling = [row for row in rows if row["local"] > max(most, stack.get((row["kernel"], row["storage"], row["arch"]), 0))]
    spilling += [row for row in rows if row["local"] and row["registers"] > 168 and pinned()]
    assert not spilling
    assert max(row["registers"] for row in rows) < (255 if pinned() else 256)
