"""NVAE_FAST_BUILD: every way to stop ends in one clear line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def build(source, tmp_path, **env):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    return subprocess.run(command, cwd=source, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture
def no_compiler(tmp_path):
    return {"CXX": str(tmp_path / "no-such-compiler")}


def test_unknown_mode(source_copy, tmp_path):
    done = build(source_copy, tmp_path, NVAE_FAST_BUILD="gpu")
    assert done.returncode == 1
    assert done.stderr.strip() == "nvae_fast: NVAE_FAST_BUILD is 'gpu': expected one of auto, cpu, cuda, none"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_without_a_cuda_torch(source_copy, tmp_path):
    done = build(source_copy, tmp_path, NVAE_FAST_BUILD="cuda")
    assert done.returncode == 1
    assert done.stderr.strip() == "nvae_fast: NVAE_FAST_BUILD=cuda, but this torch was built without CUDA"


def test_no_compiler(source_copy, tmp_path, no_compiler):
    done = build(source_copy, tmp_path, NVAE_FAST_BUILD="cpu", **no_compiler)
    assert done.returncode == 1 and "NVAE_FAST_BUILD=cpu, but there is no C++ compiler" in done.stderr.splitlines()[-1]
    done = build(source_copy, tmp_path, NVAE_FAST_BUILD="auto", **no_compiler)
    assert done.returncode == 0 and "installing without native code" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_compile_error_names_the_way_out(source_copy, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\ncase \"$*\" in *-dumpfullversion*) echo 12.2.0;; *--version*) echo g++ 12.2.0;; "
                        "*) echo 'error: broken' >&2; exit 1;; esac\n")  # fmt: skip
    compiler.chmod(0o755)
    done = build(source_copy, tmp_path, NVAE_FAST_BUILD="auto", CXX=str(compiler))
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("nvae_fast: the native extension did not compile") and "NVAE_FAST_BUILD=none" in last
