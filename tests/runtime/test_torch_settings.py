"""Which device a rank computes on, what its hardware has, and how torch computes there; GPUs are what torch says."""

from __future__ import annotations

import os

import pytest
import torch

from coconut_ds.checkpoints import store
from coconut_ds.engine import build
from coconut_ds.errors import InputError
from coconut_ds.memory import batch_size, meter
from coconut_ds.runtime import distributed, torch_settings
from coconut_ds.runtime.torch_settings import deterministic, prepare_device


@pytest.fixture
def card(monkeypatch):
    """Torch sees cards of these capabilities; what it was asked, in order."""
    monkeypatch.delenv("DS_ACCELERATOR")
    asked: list[str] = []

    def see(*capabilities: tuple[int, int]) -> list[str]:
        def capability(index: int | torch.device) -> tuple[int, int]:
            asked.append("capability")
            return capabilities[index if isinstance(index, int) else index.index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"set {device}"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        # As torch has it by default: a card that emulates bf16 counts as one that has it.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append("bf16"))
        return asked

    return see


@pytest.mark.parametrize(
    ("capabilities", "has_bf16"),
    [([(7, 5)], False), ([(8, 0)], True), ([(9, 0)], True), ([(9, 0), (7, 5)], False), ([(7, 5), (9, 0)], False)],
)
def test_bf16_is_for_cards_that_have_it_and_the_oldest_decides(card, monkeypatch, capabilities, has_bf16):
    monkeypatch.setenv("LOCAL_SIZE", str(len(capabilities)))
    card(*capabilities)
    assert build.describe_device() == build.Device("cuda", has_bf16=has_bf16, has_fp16=True)


def test_a_card_older_than_volta_has_neither_half_precision(card):
    card((6, 1))
    assert build.describe_device() == build.Device("cuda", has_bf16=False, has_fp16=False)


def test_a_rank_takes_its_card_before_it_asks_any(card, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    asked = card((7, 5), (7, 5))
    prepare_device()
    build.describe_device()
    assert asked[0] == "set cuda:1"
    assert "bf16" not in asked, "torch would make a tensor"


def test_more_ranks_than_cards_are_refused_by_every_rank(card, monkeypatch):
    card((7, 5), (7, 5))
    monkeypatch.setenv("LOCAL_SIZE", "3")
    with pytest.raises(InputError, match=r"^3 ranks on this machine, and torch sees 2 GPUs; start as many ranks as"):
        prepare_device()


def test_with_ds_accelerator_cpu_no_card_is_touched(card, monkeypatch):
    asked = card((9, 0))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = torch.get_rng_state()
    prepare_device()
    assert distributed.device() == torch.device("cpu")
    assert build.describe_device().kind == "cpu"
    assert set(store._random_state()) == {"cpu"}
    store._set_random_state({"rank0.cpu": before, "rank0.cuda": before})
    meter.begin_peak()
    assert set(meter.peak_memory()) == {"peak_memory_gib"}
    assert batch_size.memory_budget() > 0
    assert asked == []


@pytest.mark.parametrize(("named", "on"), [(None, "cuda"), ("cuda", "cuda"), ("cpu", "cpu"), ("xpu", "cpu")])
def test_the_device_is_the_one_that_deepspeed_is_told(card, monkeypatch, named, on):
    card((8, 0))
    if named:
        monkeypatch.setenv("DS_ACCELERATOR", named)
    assert distributed.device().type == on


def test_a_deepspeed_on_another_device_is_refused(card):
    """It was imported with DS_ACCELERATOR=cpu in this process."""
    card((8, 0))
    with pytest.raises(InputError, match=r"DeepSpeed computes on cpu and this trainer on cuda \(DS_ACCELERATOR=\)"):
        build.start_process_group()
    assert not distributed.has_group()


def test_kernels_and_sums_are_chosen_once(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
        prepare_device()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not matmul.allow_fp16_reduced_precision_reduction
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_deterministic_holds_within_its_context_alone(monkeypatch, given):
    monkeypatch.delenv(torch_settings._CUBLAS, raising=False)
    if given:
        monkeypatch.setenv(torch_settings._CUBLAS, given)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[torch_settings._CUBLAS] == (given or ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get(torch_settings._CUBLAS) == given
