"""Packages, their folders, and the native extension nvae_fast._C. Everything else is in pyproject.toml.

NVAE_FAST_BUILD   auto (default): C++ where a compiler is, and the CUDA sources where nvcc and a CUDA torch are
                  cpu: C++ only;  cuda: both, or stop;  none: no extension, every op runs its PyTorch reference
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX: as torch.utils.cpp_extension reads them
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
# No -march: one build runs on any CPU of its family; csrc/common/isa.h compiles the hot loops once per instruction set.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
NVCC_FLAGS = ["-O3", "--threads=2"]
# sm_80 code also runs on 8.6 and 8.9, and PTX on what comes later. Set here, because torch would ask the GPUs present.
CUDA_ARCHS = "8.0;9.0+PTX"


def stop(line: str) -> None:
    raise SystemExit(f"nvae_fast: {line}")


def packages() -> tuple[list[str], dict[str, str]]:
    """kernels/ installs as nvae_fast.kernels, benchmarks/ (its Python, not its results) as nvae_fast.benchmarks."""
    names = find_packages(str(ROOT), include=["nvae_fast", "nvae_fast.*"])
    folders = {"nvae_fast": "nvae_fast"}
    for folder in ("kernels", "benchmarks"):
        if (ROOT / folder / "__init__.py").is_file():
            package = f"nvae_fast.{folder}"
            folders[package] = folder
            names += [package, *(f"{package}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return names, folders


def missing_for_cpp() -> str | None:
    """What keeps C++ from being compiled here, None when nothing does."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ('{compiler}' is not on PATH; Debian, Ubuntu: apt install g++)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"no {header} (Debian, Ubuntu: apt install python3-dev)"
    return None


def cuda_home(found: str | None) -> str | None:
    """A folder with CUDA's headers: `found` by torch, which is nvcc's, perhaps of a script that stands for it, or the usual."""
    for home in filter(None, (found, "/usr/local/cuda")):
        if any(header for folder in ("", "targets/*/") for header in Path(home).glob(f"{folder}include/cuda_runtime.h")):
            return home
    return None


def sources(cuda: bool) -> list[str]:
    """Every .cpp, and with CUDA every .cu. The files <op>_cuda.cpp need CUDA's headers: they are left to builds with CUDA."""
    found = [path for path in ROOT.glob("csrc/**/*.cpp") if cuda or not path.stem.endswith("_cuda")]
    if cuda:
        found += ROOT.glob("csrc/**/*.cu")
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def extension() -> tuple[list, dict]:
    """(ext_modules, cmdclass) as NVAE_FAST_BUILD says."""
    mode = os.environ.get("NVAE_FAST_BUILD", "auto")
    if mode not in MODES:
        stop(f"NVAE_FAST_BUILD is '{mode}': expected one of {', '.join(MODES)}")
    if mode == "none" or "sdist" in sys.argv:
        return [], {}
    missing = missing_for_cpp()
    if missing is not None:
        if mode != "auto":
            stop(f"NVAE_FAST_BUILD={mode}, but there is {missing}")
        print(f"nvae_fast: {missing}: installing without native code", file=sys.stderr)
        return [], {}
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(f"the build needs '{error.name}': pip install it first, or set NVAE_FAST_BUILD=none")

    found, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, cuda_home(cpp_extension.CUDA_HOME)
    cuda = mode != "cpu" and bool(torch.version.cuda and found and cpp_extension.CUDA_HOME)
    if mode == "cuda" and not cuda:
        lack = f"there is no cuda_runtime.h in {found}/include" if found else "nvcc was not found"
        lack = f"{lack} (set CUDA_HOME)" if torch.version.cuda else "this torch was built without CUDA"
        stop(f"NVAE_FAST_BUILD=cuda, but {lack}")
    make = cpp_extension.CppExtension
    macros = [("NVAE_FAST_TORCH", f'"{torch.__version__}"')]
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        make = cpp_extension.CUDAExtension
        macros.append(("NVAE_FAST_CUDA", "1"))
    module = make(
        "nvae_fast._C",
        sources(cuda),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=macros,
        extra_link_args=["-fopenmp", "-s"],
    )
    objects = ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{torch.__version__}"
    return [module], {"build_ext": guarded(cpp_extension.BuildExtension, str(objects))}


def guarded(base: type[build_ext], objects: str) -> type[build_ext]:
    """Keeps its objects from build to build, and ends a failed one in a line that says how to go on without native code."""

    class Build(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = objects

        def build_extensions(self) -> None:
            for module in self.extensions:  # fresh lists: the base appends to them each time, and other flags recompile
                module.extra_compile_args = {"cxx": [*CXX_FLAGS], "nvcc": [*NVCC_FLAGS]}
            try:
                super().build_extensions()
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                stop("the native extension did not compile (see above); NVAE_FAST_BUILD=none installs without it")

    return Build


names, folders = packages()
modules, commands = extension()
setup(packages=names, package_dir=folders, ext_modules=modules, cmdclass=commands)
