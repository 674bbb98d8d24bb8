"""What `pip install .` brings along: a wheel and a source archive are built, offline, and looked into."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from coconut_ds.config.ds_json import DeepSpeedConfigError, ds_json_path, read_ds_json, shipped_ds_jsons
from coconut_ds.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"
NEEDED = {f"coconut_ds/{each.relative_to(ROOT).as_posix()}" for each in (ROOT / "ds_configs").glob("*.json")}
NEEDED |= {
    each.relative_to(ROOT).as_posix()
    for each in (ROOT / "coconut_ds").rglob("*")
    if each.is_file() and "__pycache__" not in each.parts
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a build needs of the tree; it leaves folders of its own beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("coconut_ds", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True, timeout=200)
    (made,) = out.iterdir()
    return made


def test_a_wheel_has_every_module_and_every_file_beside_them(source, tmp_path):
    with zipfile.ZipFile(build("build_wheel", source, tmp_path)) as wheel:
        assert set(wheel.namelist()) >= NEEDED
        wheel.extractall(tmp_path / "installed")
    # Elsewhere, where nothing but the installed package is.
    code = "import coconut_ds, sys; from coconut_ds.config.ds_json import read_ds_json, shipped_ds_jsons\n"
    code += "from coconut_ds.config.run_config import RunConfig; print(coconut_ds.__file__, len(shipped_ds_jsons()))\n"
    code += "print(read_ds_json(RunConfig().deepspeed)['zero_optimization']['stage'])"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines()[-2:] == [f"{tmp_path}/installed/coconut_ds/__init__.py 6", "2"], done.stderr


def test_a_wheel_can_be_built_from_a_source_archive(source, tmp_path):
    (tmp_path / "out").mkdir()
    with tarfile.open(build("build_sdist", source, tmp_path / "out")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("coconut_ds-*")
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(build("build_wheel", unpacked, tmp_path / "wheel")) as wheel:
        assert set(wheel.namelist()) >= NEEDED


def test_a_deepspeed_file_is_looked_for_here_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_json("ds_configs/zero3.json")["zero_optimization"]["stage"] == 3
    assert len(shipped_ds_jsons()) == 6
    # A file of one's own comes first, under the same name or another.
    (tmp_path / "ds_configs").mkdir()
    for name in ("zero3.json", "mine.json"):
        (tmp_path / "ds_configs" / name).write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        assert read_ds_json(f"ds_configs/{name}")["zero_optimization"]["stage"] == 1
    assert len(shipped_ds_jsons()) == 7
    assert ds_json_path("zero3.json") == Path("zero3.json")
    assert ds_json_path(tmp_path / "ds_configs" / "zero2.json") == tmp_path / "ds_configs" / "zero2.json"
    # By its name alone.
    assert ds_json_path("zero3") == Path("ds_configs/zero3.json")
    assert ds_json_path("mine") == Path("ds_configs/mine.json")
    assert read_ds_json("zero2_offload")["zero_optimization"]["stage"] == 2
    (tmp_path / "zero2").mkdir()
    assert ds_json_path("zero2").parts[-3:] == ("coconut_ds", "ds_configs", "zero2.json")
    with pytest.raises(DeepSpeedConfigError, match=r"did you mean 'zero2_offload'.*by its name alone \(zero2\)"):
        read_ds_json("zero2_ofload")
    for missing in ("ds_configs/none.json", "zero3.json", "ds_configs", "none"):
        with pytest.raises(DeepSpeedConfigError, match=r"cannot be read: .*; name one of ds_configs/mine.json, ds_con"):
            read_ds_json(missing)
    assert ds_json_path(RunConfig().deepspeed).is_file()
