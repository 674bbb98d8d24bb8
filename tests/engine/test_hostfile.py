"""A hostfile that was named and is not there stops a run, which would train on one machine alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import launching
import psutil
import pytest
import tiny

from coconut_ds.engine.hostfile import demand_hostfile
from coconut_ds.errors import InputError

LAUNCH = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "coconut_ds/train.py"]
RUN = ["coconut_ds/train.py", "--run", "run.yaml", "-H", "hosts"]


class Started:
    """A process as psutil shows it."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder

    def cmdline(self) -> list[str]:
        return self.command

    def cwd(self) -> str:
        return str(self.folder)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """This process becomes a rank of the given command, started in `tmp_path`."""
    monkeypatch.delenv("CROSS_SIZE", raising=False)

    def start(*command: str, ranks_by: list[str] = LAUNCH) -> None:
        shell = Started(["bash", "-c", "deepspeed --hostfile other"], tmp_path / "elsewhere")
        ancestors = [Started(ranks_by, tmp_path), Started(list(command), tmp_path), shell]
        monkeypatch.setattr(psutil.Process, "parents", lambda process: ancestors)

    return start


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/env/bin/deepspeed", "--hostfile", "hosts", *RUN],
        ["python", "/env/bin/deepspeed", "--hostfile=hosts", "--num_gpus", "2", *RUN],
        ["python", "/env/bin/deepspeed", "-H", "hosts", *RUN],
        ["python", "/env/bin/deepspeed", "-Hhosts", *RUN],
        ["python", "/env/bin/deepspeed", "--num_gpus", "2", "--hostf", "hosts", *RUN],
        ["python", "/env/bin/deepspeed.pt", "-H", "hosts", *RUN],
        ["/env/bin/ds", "-H", "hosts", *RUN],
        ["python", "-X", "faulthandler", "-m", "deepspeed.launcher.runner", "-H", "hosts", *RUN],
        ["python", "/env/lib/deepspeed/launcher/runner.py", "-H", "hosts", *RUN],
        ["timeout", "60", "deepspeed", "-H", "hosts", "--module", "coconut_ds.train", *RUN[1:]],
    ],
    ids=" ".join,
)
def test_every_way_to_name_one(started, tmp_path, command):
    started(*command)
    with pytest.raises(InputError, match=f"hostfile hosts: {tmp_path}/hosts is not there, and without it DeepSpeed"):
        demand_hostfile()
    (tmp_path / "hosts").mkdir()
    with pytest.raises(InputError, match="is not there"):
        demand_hostfile()
    (tmp_path / "hosts").rmdir()
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    demand_hostfile()


@pytest.mark.parametrize(
    ("command", "ranks_by"),
    [
        (["python", "/env/bin/deepspeed", "--num_gpus", "2", *RUN], LAUNCH),
        (["python", "/env/bin/torchrun", "--hostfile", "hosts", *RUN], ["python", "/env/bin/torchrun"]),
        (["bash", "run.sh", "--hostfile", "hosts"], LAUNCH),
    ],
    ids=["of the run and not of the launcher", "another launcher", "a shell that started the inner launcher"],
)
def test_where_none_was_given_to_the_launcher(started, command, ranks_by):
    started(*command, ranks_by=ranks_by)
    demand_hostfile()


def test_an_absolute_path(started, tmp_path):
    started("deepspeed", "-H", str(tmp_path / "far" / "hosts"), *RUN)
    with pytest.raises(InputError, match=f"{tmp_path}/far/hosts is not there"):
        demand_hostfile()


@pytest.mark.parametrize("text", ["", "/job/hostfile"], ids=["an unset variable", "DeepSpeed's default, named"])
def test_names_that_look_like_none(started, text):
    started("deepspeed", "--hostfile", text, *RUN)
    with pytest.raises(InputError, match="is not there, and without it DeepSpeed"):
        demand_hostfile()


def test_ranks_on_several_machines_have_had_one(started, monkeypatch):
    started("deepspeed", "-H", "hosts", *RUN)
    monkeypatch.setenv("CROSS_SIZE", "2")
    demand_hostfile()


def test_a_launcher_that_cannot_be_looked_at(monkeypatch):
    def denied(process: psutil.Process) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "parents", denied)
    demand_hostfile()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("hosts", "status", "said"),
    [
        (None, 2, "error: hostfile my hosts: {folder}/my hosts is not there, and without it DeepSpeed would train on"),
        # DeepSpeed's own refusal, before it starts a rank.
        ("# nobody\n", 1, "ValueError: Hostfile is empty or not formatted correctly"),
    ],
    ids=["missing", "empty"],
)
def test_the_published_command_trains_nothing(tmp_path, hosts, status, said):
    if hosts is not None:
        (tmp_path / "my hosts").write_text(hosts)
    places = {"save_path": str(tmp_path / "runs"), "deepspeed": str(launching.ROOT / "ds_configs" / "zero2.json")}
    run_file = launching.write_run(tiny.run(tmp_path) | places, tmp_path)
    command = launching.train_command(run_file, 2)
    place = command.index("coconut_ds/train.py")
    command[place] = str(launching.ROOT / command[place])
    command[place:place] = ["--hostfile", "my hosts"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=launching.TIME_LIMIT_S,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.count(said.format(folder=tmp_path)) == 1, done.stderr
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()
