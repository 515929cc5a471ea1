"""From a launcher's arguments to what the driver is asked to launch, without a GPU: every version of Triton packs them anew."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def test_kernels_are_launched_with_the_arguments_of_their_launchers(tmp_path):
    triton = importlib.util.find_spec("triton")
    headers = triton and Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if not headers or not (headers / "cuda.h").exists():
        pytest.skip("triton is not installed, or comes without CUDA's headers")
    if not shutil.which("gcc") or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Triton's launcher cannot be compiled: no gcc, or no Python.h")
    source, library = Path(__file__).with_name("driver.c"), tmp_path / "libcuda.so.1"
    flags = ["-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{headers}"]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    (tmp_path / "libcuda.so").symlink_to(library.name)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, Path(__file__).with_name("launch_all.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = json.loads(done.stdout.splitlines()[-1])
    assert len(names) >= 35 and sum(names.values()) > 800
