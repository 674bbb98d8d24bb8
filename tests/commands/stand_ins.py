"""Stand-ins for programs that the command line starts."""

from __future__ import annotations

from pathlib import Path

_HEAD = """
import os, signal, subprocess, sys, time

def note(text):
    with open(os.environ["LOG"], "a") as log:
        log.write(text + "\\n")

def noted(name, status):
    def end(number, frame):
        note(f"{name} {signal.Signals(number).name}")
        if status is not None:
            sys.exit(status)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
"""
# Like DeepSpeed's: waits for its rank, and ends with status 1 when it gets a signal.
_LAUNCHER = """
noted("launcher", 1)
note("launcher " + " ".join(sys.argv[1:]))
if os.environ.get("RANK_STATUS") is None:
    note("ready")
    time.sleep(100)
rank = os.path.join(os.path.dirname(__file__), "rank.py")
sys.exit(subprocess.call([sys.executable, rank, "--local_rank=0"]))
"""
_RANK = """
status = os.environ["RANK_STATUS"]
if status.isdecimal() and "AT_ONCE" in os.environ:
    sys.exit(int(status))
rank = os.getpid()
if "WORKER" in os.environ and os.fork() == 0:  # a loader worker, whose command line is that of its rank
    noted("worker", 1)
    while os.getppid() == rank:
        time.sleep(0.02)
    os._exit(0)
noted("rank", int(status) if status.isdecimal() else None)
note("ready")
time.sleep(100)
"""


def put_executable(path: Path, script: str) -> None:
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


def put_nvidia_smi(folder: Path, *gpus: str, query: str = "") -> None:
    """`nvidia-smi` in `folder`: lists `gpus` by name with UUIDs GPU-0a, GPU-1a, ..; `query` answers a query.

    Without `query` it fails when it is asked for properties, as one of an old driver does.
    """
    folder.mkdir(exist_ok=True)
    listed = "".join(f"GPU {index}: {name} (UUID: GPU-{index}a)\\n" for index, name in enumerate(gpus))
    asked = f"printf '{query}\\n'" if query else "exit 2"
    script = f"#!/bin/sh\ncase $1 in -L) printf '{listed}' ;; *) {asked} ;; esac\n"
    put_executable(folder / "nvidia-smi", script)


def put_launcher(folder: Path, launcher: str | None = None) -> None:
    """A package `deepspeed` in `folder`, whose launcher is `launcher`, or one that writes what it gets to $LOG.

    That one starts a rank if $RANK_STATUS is set: the status it ends with after a signal, or `never`. With $AT_ONCE it
    ends at once, with $WORKER it forks a child that notes signals, too.
    """
    place = folder / "deepspeed" / "launcher"
    place.mkdir(parents=True)
    for package in (place, place.parent):
        (package / "__init__.py").touch()
    (place / "runner.py").write_text(launcher or _HEAD + _LAUNCHER, encoding="utf-8")
    (place / "rank.py").write_text(_HEAD + _RANK, encoding="utf-8")
