"""`pip install .` into a new environment, then everything from an empty folder: nothing is needed of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import launching
import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]
CHECKPOINT = "runs/run/checkpoints/epoch_0001"


@dataclass(frozen=True)
class Installed:
    """An environment that has the package, and the folder, empty at first, in which its commands are typed."""

    environment: Path
    folder: Path

    def run(self, *words: str, status: int = 0) -> str:
        """What a command wrote, started by the environment's own `python` or `deepspeed`."""
        outside = {key: value for key, value in launching.environment().items() if key != "PYTHONPATH"}
        process = subprocess.Popen(
            [str(self.environment / "bin" / words[0]), *words[1:]],
            cwd=self.folder,
            env=outside | {"MASTER_PORT": str(launching.free_port())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        done = launching.finish(process)
        assert done.returncode == status, done.stdout[-4000:]
        return str(done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Built from a copy of the tree; the libraries are the suite's."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("coconut_ds", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = place / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    variables = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [*pip, "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(install, cwd=source, env=alone, check=True, timeout=200)
    # As pip writes it for DeepSpeed, which is not installed here once more.
    script = Path(sys.executable).with_name("deepspeed").read_text()
    launcher = environment / "bin" / "deepspeed"
    launcher.write_text(f"#!{python}\n{script.partition(chr(10))[2]}")
    launcher.chmod(0o755)
    (place / "folder").mkdir()
    return Installed(environment, place / "folder")


@pytest.fixture(scope="module")
def trained(installed) -> Installed:
    """A run of one epoch, on two steps."""
    assert list(installed.folder.iterdir()) == []
    run = tiny.run(installed.folder) | {"num_epochs": 1, "batch_size_training": 4, "save_path": "runs"}
    run |= {"gradient_accumulation_steps": 1, "deepspeed": "zero2_offload"}
    launching.write_run(run, installed.folder).rename(installed.folder / "my.yaml")
    output = installed.run("python", "-m", "coconut_ds", "train", "--run", "my.yaml", "--ranks", "1")
    assert "  devices   1 x cpu, zero2_offload" in output
    assert f"  evaluate  python -m coconut_ds eval {CHECKPOINT}\n" in output
    assert (installed.folder / CHECKPOINT).is_dir()
    return installed


def test_what_is_imported_is_what_was_installed(installed):
    where = "import coconut_ds, torch; print(coconut_ds.__file__)"
    assert Path(installed.run("python", "-c", where).split()[-1]).is_relative_to(installed.environment)


def test_deepspeed_s_launcher_trains_on_the_module(trained):
    changes = ["name=by_module", "deepspeed=ds_configs/zero1.json", "batch_size_training=2"]
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(launching.free_port())]
    output = trained.run(*launcher, "--module", "coconut_ds.train", "--run", "my.yaml", *changes)
    assert "  devices   2 x cpu, ds_configs/zero1.json" in output
    assert (trained.folder / "runs" / "by_module" / "checkpoints" / "epoch_0001").is_dir()


COMMANDS = {
    "": "train a list of runs",
    "plan --run my.yaml --memory 11 --ranks 1": "ds_configs/zero2_offload.json",
    f"eval {CHECKPOINT} --ranks 1": "accuracy",
    f"ask {CHECKPOINT} question": "",
    "compare a=runs/run b=runs/run": "accuracy",
    "report runs/run": "report: runs/run/report/report.html",
    "inspect --help": "--intervene",
    f"export {CHECKPOINT} exported": "written: exported",
    "sweep sweep.txt": "runs/run is finished",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_other_command_works_from_there(trained, command):
    (trained.folder / "sweep.txt").write_text("my.yaml\n")
    assert COMMANDS[command] in trained.run("python", "-m", "coconut_ds", *command.split())


def test_the_demo_names_the_checkout_it_needs(installed):
    assert "./launch.sh demo" in installed.run("python", "-m", "coconut_ds", "demo", status=2)
