from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") is not None


def python(bin: Path, code: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run([bin / "python", "-W", "always", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_wheel_holds_the_package_and_nothing_else(native_wheel):
    names = zipfile.ZipFile(native_wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"nvae_fast", "nvae_fast-0.1.0.dist-info"}
    for wanted in ("py.typed", "kernels/_impl.py", "kernels/residual_normal/README.md", "kernels/residual_normal/ops.py"):
        assert f"nvae_fast/{wanted}" in names
    here = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nvae_fast/**/*.py")}
    here |= {"nvae_fast/" + p.relative_to(ROOT).as_posix() for p in ROOT.glob("kernels/**/*.py")}
    here |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nvae_fast/data/demo/*") if p.is_file()}
    assert here <= set(names)
    assert not [n for n in names if n.endswith((".cpp", ".h", ".cu", ".o")) or "results" in n]
    assert any(re.fullmatch(r"nvae_fast/_C\..*\.so", n) for n in names) == COMPILER


def test_sdist_holds_what_a_build_needs(source_copy, tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=source_copy, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {n.split("/", 1)[-1] for n in tarfile.open(archive).getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "csrc/registration.cpp", "csrc/common/isa.h", "kernels/_impl.py"}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_import_touches_no_gpu_and_nothing_heavy(native, tmp_path):
    code = """
import sys, time
import torch, numpy
def touched(*args, **kwargs): raise AssertionError("import queried a GPU")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init", "init"):
    setattr(torch.cuda, name, touched)
before, start = set(sys.modules), time.perf_counter()
import nvae_fast
print(f"import nvae_fast after torch: {time.perf_counter() - start:.3f} s, from {nvae_fast.__file__}")
new = set(sys.modules) - before
heavy = {"triton", "tensorboard", "torchvision", "matplotlib", "lmdb", "webdataset", "scipy", "ninja", "huggingface_hub"}
assert not heavy & {name.split(".")[0] for name in new}, heavy & new
assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"))]
assert "nvae_fast._C" not in sys.modules
assert nvae_fast.__version__ == "0.1.0"
"""
    said = python(native, code, tmp_path)
    print(said.stdout)
    assert str(native.parent) in said.stdout and "Warning" not in said.stderr


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_native_code_runs_from_the_wheel(native, tmp_path):
    code = """
import torch
from nvae_fast.kernels import _impl, residual_normal as rn
info = _impl.load_native()[0].build_info()
assert info["torch"] == torch.__version__ and "baseline" in info["instruction_sets"], info
x = torch.randn(1, 2, 4, 4)
print(rn.residual_normal(x, x, impl="cpu").z.shape)
"""
    assert "[1, 2, 4, 4]" in python(native, code, tmp_path).stdout


def test_without_native_code_one_warning_and_the_reference(plain, tmp_path):
    code = """
import torch
from nvae_fast.kernels import residual_normal as rn
x = torch.randn(1, 2, 4, 4)
for _ in range(3):
    rn.residual_normal(x, x)
try:
    rn.residual_normal(x, x, impl="cpu")
except RuntimeError as error:
    print(error)
"""
    done = python(plain, code, tmp_path)
    assert done.stderr.count("RuntimeWarning: nvae_fast was installed without its native extension") == 1
    assert done.stdout.startswith("residual_normal: impl='cpu' cannot run: nvae_fast was installed without")


@pytest.mark.parametrize("kind", ["native", "plain"])
def test_command_line_and_env(kind, request, tmp_path):
    bin = request.getfixturevalue(kind)
    version = subprocess.run([bin / "nvae-fast", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert version.stdout.strip() == "nvae_fast 0.1.0", version.stderr
    printed = python(bin, "import nvae_fast.env as e; e.main()", tmp_path).stdout
    assert f"torch {torch.__version__}".split("+")[0] in printed and "residual_normal" in printed


def test_kernels_is_nobody_elses_name(tmp_path):
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: `kernels` is part of nvae_fast: import nvae_fast.kernels"
    done = subprocess.run([sys.executable, "-c", "import kernels.residual_normal"], cwd=ROOT, capture_output=True, text=True)
    assert "import nvae_fast.kernels" in done.stderr


@pytest.mark.parametrize("cwd", ["repository", "elsewhere"])
def test_this_environments_install_works_from_anywhere(cwd, tmp_path):
    code = "import nvae_fast.kernels.residual_normal as r; print(r.__name__)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT if cwd == "repository" else tmp_path, check=True)
