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
if {cuda}:
    torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "/usr/local/cuda"
def show(ext_modules, cmdclass, **others):
    (module,) = ext_modules
    print(json.dumps([module.sources, module.define_macros, module.libraries, os.environ.get("TORCH_CUDA_ARCH_LIST")]))
setuptools.setup = show
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
"""


def extension(mode: str, cuda: bool) -> tuple[list[str], dict[str, str], list[str], str | None]:
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"} | {"NVAE_FAST_BUILD": mode}
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(cuda=cuda)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sources, macros, libraries, archs = json.loads(done.stdout.splitlines()[-1])
    return sources, dict(macros), libraries, archs


@pytest.mark.skipif(NATIVE is None, reason="there is no C++ compiler, or nothing was built")
def test_sources_of_both_kinds_of_build():
    plain, macros, libraries, _ = extension("cpu", cuda=True)
    assert "NVAE_FAST_CUDA" not in macros and not any(s.endswith(".cu") or s.endswith("_cuda.cpp") for s in plain)
    assert not any("cuda" in name for name in libraries)
    both, macros, libraries, archs = extension("cuda", cuda=True)
    assert both == extension("auto", cuda=True)[0] and extension("auto", cuda=False)[0] == plain
    added = {f"csrc/depthwise_conv/depthwise_{name}" for name in
             ("conv_cuda.cpp", "cuda.cu", "cuda_f32.cu", "cuda_bf16.cu", "cuda_f16.cu")}  # fmt: skip
    assert set(both) - set(plain) == added and set(plain) <= set(both)
    assert macros["NVAE_FAST_CUDA"] == "1" and archs == "8.0;9.0+PTX" and "cudart" in libraries
    objects = [Path(source).with_suffix(".o") for source in both]
    assert len(set(objects)) == len(objects), "two sources would become one object file"


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
