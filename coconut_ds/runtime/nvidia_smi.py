"""The GPUs of this machine as nvidia-smi lists them: importing torch takes seconds, and it may not see them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from coconut_ds.errors import InputError

_LINE = re.compile(r"GPU (\d+): (.*?)(?: \(UUID: (\S+)\))?$")


@dataclass(frozen=True)
class Gpu:
    """A line of `nvidia-smi -L`."""

    index: int
    name: str
    uuid: str


@dataclass(frozen=True)
class Properties:
    """`capability` is None where the driver is too old to say it; `driver` is a version such as 580.65.06."""

    name: str
    capability: tuple[int, int] | None
    driver: str

    def __str__(self) -> str:
        capability = f"compute capability {self.capability[0]}.{self.capability[1]}, " if self.capability else ""
        return f"{self.name} ({capability}driver {self.driver})"


def all_gpus() -> list[Gpu]:
    """The GPUs of the machine, in nvidia-smi's order; none without nvidia-smi."""
    matches = map(_LINE.match, _output("-L"))
    return [Gpu(int(match[1]), match[2], match[3] or "") for match in matches if match]


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by number or UUID, in its order; all of them if it is not set.

    Raises InputError for a name that is none of them. As in CUDA, what follows -1 does not count.
    """
    gpus, named = all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not gpus:
        return gpus
    names = [name.strip() for name in named.split(",") if name.strip()]
    return [_named(name, gpus) for name in (names[: names.index("-1")] if "-1" in names else names)]


def _named(name: str, gpus: list[Gpu]) -> Gpu:
    for gpu in gpus:
        if name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name)):
            return gpu
    raise InputError(
        f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: nvidia-smi lists no GPU {name}; write numbers "
        f"from 0 to {len(gpus) - 1}, or start the ranks by torchrun"
    )


def properties(gpu: Gpu) -> Properties:
    """What a person needs to know to choose a build of torch for it."""
    # Drivers before 510 do not know the field and print nothing else then.
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):
        found = _output(f"--id={gpu.index}", f"--query-gpu={fields}", "--format=csv,noheader")
        if found:
            name, driver, *capability = (value.strip() for value in found[0].split(","))
            return Properties(name, _version(capability[0]) if capability else None, driver)
    return Properties(gpu.name, None, "unknown")


def _version(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _output(*options: str) -> list[str]:
    """The lines that nvidia-smi prints; none where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []
