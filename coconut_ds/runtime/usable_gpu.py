"""Refuses a GPU that this build of torch cannot compute on, with the build that can; nothing falls back to the CPU."""

from __future__ import annotations

import os
import re

import torch

from coconut_ds.errors import InputError, in_one_line
from coconut_ds.runtime import distributed
from coconut_ds.runtime.nvidia_smi import Properties, properties, visible_gpus

_BLACKWELL, _TURING = (10, 0), (7, 5)
_CUDA_13_DRIVER, _CUDA_12_DRIVER = 580, 525
"""First drivers that run builds of torch for CUDA 13, and for CUDA 12."""


def demand_usable_gpus() -> None:
    """Raise InputError if this torch lacks kernels for a GPU of this machine's ranks, or sees none though one is here.

    DS_ACCELERATOR=cpu is how a person chooses the CPU, and CUDA_VISIBLE_DEVICES hides GPUs.
    """
    if distributed.device().type == "cuda":
        # Every rank looks at all of them, since the first one speaks for all.
        for index in range(distributed.ranks_here()):
            _demand_kernels(index)
    elif os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and (gpus := visible_gpus()):
        gpu = properties(gpus[0])
        raise InputError(_message(gpu, _why_unavailable(), _ways_out(gpu, could_update=torch.version.cuda is not None)))


def _demand_kernels(index: int) -> None:
    """What torch itself only warns of, before the first kernel fails."""
    built_for = torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip or not built_for or any(_runs_on(each, major, minor) for each in built_for):
        return
    driver = next((properties(gpu).driver for gpu in visible_gpus()), "unknown")
    gpu = Properties(torch.cuda.get_device_name(index), (major, minor), driver)
    why = f"it is built for CUDA {torch.version.cuda} and has kernels for {' '.join(built_for)} only"
    raise InputError(_message(gpu, why, _ways_out(gpu, could_update=False)))


def _runs_on(built_for: str, major: int, minor: int) -> bool:
    """Machine code (sm_86) runs on cards of its generation that are as new, PTX (compute_86) on every newer card."""
    match = re.match(r"(sm|compute)_(\d+)", built_for)
    code = divmod(int(match[2]), 10) if match else (0, 0)
    return code <= (major, minor) and (built_for.startswith("compute") or code[0] == major)


def _why_unavailable() -> str:
    if torch.version.cuda is None:
        return "it is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"it is built for CUDA {torch.version.cuda} and finds no GPU ({in_one_line(error, 120)})"
    return f"it is built for CUDA {torch.version.cuda} and finds no GPU"


def _ways_out(gpu: Properties, could_update: bool) -> str:
    """What to install. Builds for CUDA 12.6 know the cards from Maxwell to Hopper, those for CUDA 13 from Turing on."""
    capability = gpu.capability or (0, 0)
    is_newest = capability >= _BLACKWELL
    index = "" if is_newest else " --index-url https://download.pytorch.org/whl/cu126"
    needed = _CUDA_13_DRIVER if is_newest else _CUDA_12_DRIVER
    version = torch.__version__.split("+")[0]
    install = f"install a build that can (pip install --force-reinstall torch=={version}{index})"
    driver = int(match[0]) if (match := re.match(r"\d+", gpu.driver)) else 0
    if driver and driver < needed:
        return f"update the driver to {needed} or newer and {install}"
    if could_update and capability >= _TURING and driver < _CUDA_13_DRIVER:
        return f"update the driver to {_CUDA_13_DRIVER} or newer, or {install}"
    return install


def _message(gpu: Properties, why: str, ways_out: str) -> str:
    return (
        f"{gpu}: torch {torch.__version__} cannot use it, {why}; {ways_out}, or set DS_ACCELERATOR=cpu to use the CPU"
    )
