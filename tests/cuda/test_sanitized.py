"""The kernels under the address and undefined-behaviour sanitizers: no access outside a tensor, outside the shared memory that
was asked for, or misaligned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import ROOT, build, compiler

FLAGS = ["-fsanitize=address,alignment,bounds,signed-integer-overflow", "-fno-sanitize-recover=all"]


def runtime(name: str) -> str | None:
    """The sanitizer's shared library, None where the compiler has none."""
    if shutil.which(compiler()) is None:
        return None
    path = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


def test_every_access_is_inside_and_aligned(tmp_path):
    preload = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in preload:
        pytest.skip("the compiler has no shared sanitizers, as g++ has them")
    library = build(tmp_path, *FLAGS, bfloat16=False)
    environment = os.environ | {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "clean: any auto core tensor", done.stderr[-4000:] + done.stdout
