"""Compiles `hooks.cpp`, once per version of torch and of the source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("hooks.cpp")


def library() -> Path:
    """The compiled hooks, in the user's cache; skips without a compiler, and where torch has a CUDA of its own."""
    if torch.version.cuda is not None:
        pytest.skip("fake CUDA needs a CPU build of torch: this one has CUDA's hooks already")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("fake CUDA needs a C++ compiler: install g++, or name one in CXX")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coconut_ds" / "tests"
    key = hashlib.sha256(f"{torch.__version__} {torch.__file__}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = cache / f"fake_cuda_{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Two workers may build at once: each to a name of its own, and the last one to finish stays.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _compile(compiler, Path(folder) / path.name).replace(path)
    return path


def _compile(compiler: str, path: Path) -> Path:
    (libraries,) = library_paths()
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", *(f"-I{each}" for each in include_paths())]
    links = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    command = [compiler, *flags, str(SOURCE), "-o", str(path), *links]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return path
