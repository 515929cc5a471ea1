"""The build with CUDA, as far as it can be seen without a CUDA torch: sources, flags, and the binding's syntax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import ROOT, compiler
from norms import NATIVE
from torch.utils.cpp_extension import include_paths

SHOW = """
import json, os, runpy, setuptools, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = {cuda!r}, {home!r}
def show(ext_modules, cmdclass, **others):
    (module,) = ext_modules
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
    print(json.dumps([module.sources, module.define_macros, module.libraries, archs, module.include_dirs]))
setuptools.setup = show
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
"""


def shown(mode: str, cuda: str | None, home: Path | None) -> subprocess.CompletedProcess:
    """Of a torch built with CUDA of that version, which found nvcc in `home`."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"} | {"NVAE_FAST_BUILD": mode}
    code = SHOW.format(cuda=cuda, home=home and str(home))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def extension(mode: str, home: Path | None) -> tuple[list[str], dict[str, str], list[str], str | None]:
    done = shown(mode, "13.0" if home else None, home)
    assert done.returncode == 0, done.stderr[-2000:]
    sources, macros, libraries, archs, _ = json.loads(done.stdout.splitlines()[-1])
    return sources, dict(macros), libraries, archs


@pytest.mark.skipif(NATIVE is None, reason="there is no C++ compiler, or nothing was built")
def test_sources_of_both_kinds_of_build(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    plain, macros, libraries, _ = extension("cpu", tmp_path)
    assert "NVAE_FAST_CUDA" not in macros and not any(s.endswith(".cu") or s.endswith("_cuda.cpp") for s in plain)
    assert not any("cuda" in name for name in libraries)
    both, macros, libraries, archs = extension("cuda", tmp_path)
    assert both == extension("auto", tmp_path)[0] and extension("auto", None)[0] == plain
    added = {f"csrc/depthwise_conv/depthwise_{name}" for name in
             ("conv_cuda.cpp", "cuda.cu", "cuda_f32.cu", "cuda_bf16.cu", "cuda_f16.cu")}  # fmt: skip
    assert set(both) - set(plain) == added and set(plain) <= set(both)
    assert macros["NVAE_FAST_CUDA"] == "1" and archs == "8.0;9.0+PTX" and "cudart" in libraries
    objects = [Path(source).with_suffix(".o") for source in both]
    assert len(set(objects)) == len(objects), "two sources would become one object file"


@pytest.mark.parametrize("deeper", ["", "targets/x86_64-linux"], ids=["beside nvcc", "as conda has them"])
def test_headers_of_cuda_are_looked_for(tmp_path, deeper):
    """A script that stands for nvcc has none beside it: they are taken from the usual place then."""
    usual = Path("/usr/local/cuda/include/cuda_runtime.h").exists()
    done = shown("cuda", "13.0", tmp_path)
    if usual:
        assert done.returncode == 0 and "/usr/local/cuda/include" in json.loads(done.stdout.splitlines()[-1])[-1]
    else:
        why = f"NVAE_FAST_BUILD=cuda, but there is no cuda_runtime.h in {tmp_path}/include (set CUDA_HOME)"
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"nvae_fast: {why}"
    header = tmp_path / deeper / "include" / "cuda_runtime.h"
    header.parent.mkdir(parents=True)
    header.touch()
    done = shown("cuda", "13.0", tmp_path)
    assert done.returncode == 0 and f"{tmp_path}/include" in json.loads(done.stdout.splitlines()[-1])[-1]


@pytest.mark.parametrize(("cuda", "why"), [
    (None, "this torch was built without CUDA"), ("13.0", "nvcc was not found (set CUDA_HOME)")
])  # fmt: skip
def test_a_build_with_cuda_that_cannot_be_says_why(cuda, why):
    done = shown("cuda", cuda, None)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"nvae_fast: NVAE_FAST_BUILD=cuda, but {why}"


def test_the_binding_compiles(tmp_path):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not Path(home, "include", "cuda_runtime.h").exists():
        pytest.skip("the CUDA headers were not found")
    if not any(Path(path, "c10/cuda/impl/cuda_cmake_macros.h").exists() for path in include_paths()):
        made = tmp_path / "c10" / "cuda" / "impl"  # which a CPU torch leaves out
        made.mkdir(parents=True)
        (made / "cuda_cmake_macros.h").write_text("#pragma once\n")
    folders = [str(tmp_path), str(ROOT / "csrc"), *include_paths(), f"{home}/include"]
    command = [compiler(), "-fsyntax-only", "-std=c++20", "-DNVAE_FAST_CUDA=1", "-Wall", "-Werror=unused"]
    source = str(ROOT / "csrc" / "depthwise_conv" / "depthwise_conv_cuda.cpp")
    done = subprocess.run([*command, *(f"-I{path}" for path in folders), source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
