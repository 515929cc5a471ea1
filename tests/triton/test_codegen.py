"""What Triton makes of the kernels for sm_80 and sm_90, compiled here without a GPU: wide accesses, nothing in local memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_every_kernel_compiles_for_both_architectures(rows):
    plain = [row for row in rows if not {"absent", "ones", "wide"} & set(row)]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == 15 and {row["arch"] for row in plain} == {80, 90}
    assert all(sum(row["kernel"] == name for row in plain) in (2, 4) for name in kernels)


def test_images_are_read_and_written_16_bytes_at_a_time(rows):
    images = [row for row in rows if row["images"] and not row.get("ones")]
    assert {row["storage"] for row in images} == {"fp32", "fp16"}
    for row in images:
        read = [name for name in row["images"] if name not in ("y_ptr", "dx_ptr", *row.get("absent", ()))]
        assert set(row["loads"]) == {"128"} and row["loads"]["128"] >= len(read), row
        if {"y_ptr", "dx_ptr", "du_ptr"} & set(row["images"]):
            assert set(row["stores"]) == {"128"}, row


def test_nothing_spills_into_local_memory(rows):
    assert not [row for row in rows if row["local"]]
    assert max(row["registers"] for row in rows) < 255
