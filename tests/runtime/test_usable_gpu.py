"""A GPU that torch cannot use is named with what to install, whatever keeps torch from it; no rank takes the CPU."""

from __future__ import annotations

import os

import pytest
import stand_ins
import torch

from coconut_ds.errors import InputError
from coconut_ds.runtime import nvidia_smi
from coconut_ds.runtime.torch_settings import prepare_device

VERSION = torch.__version__.split("+")[0]
CU126 = f"pip install --force-reinstall torch=={VERSION} --index-url https://download.pytorch.org/whl/cu126"
PLAIN = f"pip install --force-reinstall torch=={VERSION})"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose nvidia-smi lists a card with this capability and driver, and a torch that sees none."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def make(name: str, capability: str, driver: str, built_for: str | None = None) -> None:
        query = f"{name}, {driver}, {capability}" if capability else ""
        stand_ins.put_nvidia_smi(tmp_path / "bin", name, query=query)
        monkeypatch.setattr(torch.version, "cuda", built_for)

    return make


def too_old(*_: object) -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")


def refusal() -> str:
    with pytest.raises(InputError) as caught:
        prepare_device()
    return str(caught.value)


def test_a_build_without_cuda(machine):
    machine("NVIDIA GeForce RTX 2080 Ti", "7.5", "580.65.06")
    assert refusal() == (
        f"NVIDIA GeForce RTX 2080 Ti (compute capability 7.5, driver 580.65.06): torch {torch.__version__} cannot use "
        f"it, it is a build without CUDA; install a build that can ({CU126}), or set DS_ACCELERATOR=cpu to use the CPU"
    )


@pytest.mark.parametrize(
    ("capability", "driver", "ways_out"),
    [
        ("7.5", "535.183.01", ["update the driver to 580 or newer, or install", CU126]),
        ("6.1", "535.183.01", ["; install", CU126]),
        ("7.0", "470.42.01", ["update the driver to 525 or newer and install", CU126]),
        ("12.0", "570.86.10", ["update the driver to 580 or newer and install", PLAIN]),
    ],
)
def test_a_driver_too_old_for_this_build(machine, monkeypatch, capability, driver, ways_out):
    machine("A Card", capability, driver, built_for="13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    said = refusal()
    assert f"A Card (compute capability {capability}, driver {driver})" in said
    assert "it is built for CUDA 13.0 and finds no GPU (The NVIDIA driver on your system is too old" in said
    assert all(way in said for way in ways_out), said


def test_a_driver_that_does_not_say_the_capability(machine):
    machine("Tesla P100", "", "")
    assert refusal().startswith(f"Tesla P100 (driver unknown): torch {torch.__version__} cannot use it")


@pytest.mark.parametrize(
    ("capability", "built_for", "is_usable"),
    [
        ((7, 5), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", True),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", True),
        ((6, 1), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((7, 0), "sm_75 sm_80 compute_80", False),
        ((12, 0), "sm_50 sm_80 sm_90a compute_90", True),
        ((12, 0), "sm_50 sm_80 sm_90", False),
        ((6, 1), "", True),
    ],
)
def test_a_card_without_kernels_in_this_build(machine, monkeypatch, capability, built_for, is_usable):
    machine("GTX 1080 Ti", "6.1", "580.65.06", built_for="13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GTX 1080 Ti")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", built_for.split)
    if is_usable:
        prepare_device()
        return
    said = refusal()
    assert said.startswith(f"GTX 1080 Ti (compute capability {capability[0]}.{capability[1]}, driver 580.65.06): torch")
    assert f"it is built for CUDA 13.0 and has kernels for {built_for} only" in said
    assert (PLAIN if capability == (12, 0) else CU126) in said


@pytest.mark.parametrize(("variable", "value"), [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_who_asks_for_the_cpu_gets_it(machine, monkeypatch, variable, value):
    machine("NVIDIA GeForce RTX 2080 Ti", "7.5", "580.65.06")
    monkeypatch.setenv(variable, value)
    prepare_device()


def test_without_nvidia_smi_there_are_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.all_gpus() == nvidia_smi.visible_gpus() == []
