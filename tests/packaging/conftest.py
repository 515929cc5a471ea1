from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*command: object, cwd: Path, **env: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory) -> Path:
    """What a fresh clone holds, without anything built."""
    copy = tmp_path_factory.mktemp("source") / "clone"
    copy.mkdir()
    for name in ("csrc", "kernels", "nvae_fast", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for file in ROOT.glob("*"):
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="session")
def native_wheel(tmp_path_factory) -> Path:
    """Built in place, so that objects compiled before are used again."""
    tmp = tmp_path_factory.mktemp("native")
    places = ["egg_info", "--egg-base", tmp, "build", "--build-base", tmp / "build"]
    call(sys.executable, "setup.py", *places, "bdist_wheel", "--bdist-dir", tmp / "bdist", "--dist-dir", tmp, cwd=ROOT)
    return next(tmp.glob("*.whl"))


@pytest.fixture(scope="session")
def plain_wheel(source_copy, tmp_path_factory) -> Path:
    """As pip builds it with NVAE_FAST_BUILD=none."""
    tmp = tmp_path_factory.mktemp("plain")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp]
    call(*pip, source_copy, cwd=tmp, NVAE_FAST_BUILD="none")
    return next(tmp.glob("*.whl"))


@pytest.fixture(scope="session")
def install(tmp_path_factory) -> Callable[[Path], Path]:
    """Installs a wheel into a fresh environment that sees this one's torch, but not this one's nvae_fast; its bin folder."""

    def into(wheel: Path) -> Path:
        env = tmp_path_factory.mktemp("env")
        call(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
        python = env / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
        call(*pip, cwd=env)
        packages = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=env).strip()
        # Paths in a .pth are searched, but the .pth files in them (an editable nvae_fast) are not read: all of this one's are
        # needed, as torch may be in an environment that this one sees.
        own = {sysconfig.get_path("purelib"), *(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))}
        Path(packages, "torch_of_the_tests.pth").write_text("\n".join(sorted(own)) + "\n")
        return env / "bin"

    return into


@pytest.fixture(scope="session")
def native(native_wheel, install) -> Path:
    return install(native_wheel)


@pytest.fixture(scope="session")
def plain(plain_wheel, install) -> Path:
    return install(plain_wheel)
