"""What launch.sh installs as torch, from folders that pip reads as package indexes: no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import stand_ins

ROOT = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PINNED = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
VERSION = PINNED.removeprefix("torch==")
Launch = Callable[..., subprocess.CompletedProcess]

# The suite's pip, for the environment of the test. A folder stands for PyTorch's index, and only torch is installed.
PYTHON = """#!/usr/bin/env bash
if [[ "$*" != "-m pip "* ]]; then
  exec {environment}/bin/python "$@"
fi
echo "${{*:3}}" >>{log}
[[ "$*" == *--editable* ]] && exit 0
shift 2
exec {python} -m pip --python {environment}/bin/python "${{@/#{cpu_index}/file://{folder}/cpu}}"
"""


def put_index(folder: Path, version: str, needs: str = "", package: str = "torch") -> str:
    """A package index, made or added to, with one build of a package; its URL."""
    place = folder / package
    place.mkdir(parents=True)
    module = package.replace("-", "_")
    name = f"{module}-{version}-py3-none-any.whl"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{needs}",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(place / name, "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"__version__ = '{version}'\n")
        for file, text in files.items():
            wheel.writestr(f"{module}-{version}.dist-info/{file}", text)
    (place / "index.html").write_text(f'<a href="{name}">{name}</a>')
    return f"file://{folder}"


CUDA = "Requires-Dist: nvidia-cuda-runtime (==13.0.96)\n"


@pytest.fixture
def launch(tmp_path) -> Launch:
    """`./launch.sh setup` in an environment without torch, on a machine without a GPU."""
    environment, programs = tmp_path / "environment", tmp_path / "programs"
    venv.create(environment, with_pip=False, symlinks=True)
    programs.mkdir()
    values = {"environment": environment, "python": sys.executable, "folder": tmp_path, "log": tmp_path / "pip.log"}
    script = PYTHON.format(cpu_index=CPU_INDEX.replace("/", "\\/"), **values)
    stand_ins.put_executable(programs / "python", script)
    (tmp_path / "operators").mkdir()
    (tmp_path / "operators" / ".built").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("launch.sh", "constraints.txt", "setup.cfg"):
        shutil.copy(ROOT / name, tree)
    settings = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(environment),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "operators"),
        "PIP_CONFIG_FILE": os.devnull,
    }
    own = ("PIP_", "PYTHON", "TORCH_INDEX", "DS_ACCELERATOR")
    outside = {key: value for key, value in os.environ.items() if not key.startswith(own)}

    def run(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(tree / "launch.sh"), "setup"],
            env={**outside, **settings, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def torch_of(folder: Path) -> str:
    code = "import torch; print(torch.__version__)"
    done = subprocess.run([folder / "environment" / "bin" / "python", "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def test_without_a_gpu_pytorch_s_index_of_cpu_builds_is_asked(launch, tmp_path):
    index = put_index(tmp_path / "cuda", VERSION, CUDA)
    put_index(tmp_path / "cpu", f"{VERSION}+cpu")
    done = launch(PIP_INDEX_URL=index)
    assert done.returncode == 0, done.stderr
    assert f"only CUDA builds of {PINNED}: asking {CPU_INDEX}" in done.stdout
    assert torch_of(tmp_path) == f"{VERSION}+cpu"
    calls = (tmp_path / "pip.log").read_text()
    assert f"--index-url {CPU_INDEX} {PINNED}" in calls
    assert calls.splitlines()[-1].endswith("--editable .[dev]")


@pytest.mark.parametrize("there", [False, True], ids=["no index", "no such build"])
def test_where_that_index_has_none_it_stops_and_explains(launch, tmp_path, there):
    index = put_index(tmp_path / "cuda", VERSION, CUDA)
    if there:
        put_index(tmp_path / "cpu", "0.1+cpu")
    done = launch(PIP_INDEX_URL=index)
    assert done.returncode == 2
    said = f"error: no CPU build of {PINNED} came from {CPU_INDEX}, and the package index would bring gigabytes of CUDA"
    assert said in done.stderr
    assert "set TORCH_INDEX_URL to an index" in done.stderr
    assert torch_of(tmp_path) == ""


def test_torch_index_url_wins(launch, tmp_path):
    index = put_index(tmp_path / "cuda", VERSION, CUDA)
    mine = put_index(tmp_path / "mine", f"{VERSION}+mine")
    done = launch(PIP_INDEX_URL=index, TORCH_INDEX_URL=mine)
    assert done.returncode == 0, done.stderr
    assert torch_of(tmp_path) == f"{VERSION}+mine"
    assert CPU_INDEX not in (tmp_path / "pip.log").read_text()


def test_torch_index_url_with_cuda_builds_is_refused_without_a_gpu(launch, tmp_path):
    done = launch(TORCH_INDEX_URL=put_index(tmp_path / "cuda", VERSION, CUDA))
    assert done.returncode == 2
    assert "of TORCH_INDEX_URL" in done.stderr
    assert torch_of(tmp_path) == ""


def test_an_index_with_cpu_builds_is_all_that_is_asked(launch, tmp_path):
    done = launch(PIP_INDEX_URL=put_index(tmp_path / "plain", VERSION))
    assert done.returncode == 0, done.stderr
    assert torch_of(tmp_path) == VERSION
    assert CPU_INDEX not in (tmp_path / "pip.log").read_text()


def test_with_a_gpu_the_cuda_build_is_installed(launch, tmp_path):
    index = put_index(tmp_path / "cuda", VERSION, CUDA)
    put_index(tmp_path / "cuda", "13.0.96", package="nvidia-cuda-runtime")
    stand_ins.put_executable(tmp_path / "programs" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: H100'\n")
    done = launch(PIP_INDEX_URL=index)
    assert done.returncode == 0, done.stderr
    assert torch_of(tmp_path) == VERSION
    assert CPU_INDEX not in (tmp_path / "pip.log").read_text()


@pytest.mark.parametrize("gpu", ["GPU 0: H100", ""], ids=["with a GPU", "without"])
def test_the_operators_are_built_once_before_ranks_start(launch, tmp_path, gpu):
    stand_ins.put_executable(tmp_path / "programs" / "nvidia-smi", f"#!/bin/sh\necho '{gpu}'\n")
    (tmp_path / "operators" / ".built").unlink()
    # In place of the compiler's work: notes where DeepSpeed was told to compute.
    build = tmp_path / "tree" / "coconut_ds" / "engine" / "operator_build.py"
    build.parent.mkdir(parents=True)
    note = f"open('{tmp_path}/builds', 'a').write(os.getenv('DS_ACCELERATOR', 'any') + ' ')"
    build.write_text(f"import os\n{note}\n")
    index = put_index(tmp_path / "plain", VERSION)
    for _ in range(2):
        done = launch(PIP_INDEX_URL=index)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "builds").read_text().split() == (["any"] if gpu else ["cpu"])
