"""The meter of live tensor bytes."""

from __future__ import annotations

import torch

from coconut_ds.memory import meter
from coconut_ds.memory.meter import GIB, LiveTensorMeter, begin_peak, peak_memory


def test_bytes_are_counted_once_and_given_back():
    with LiveTensorMeter() as counted:
        first = torch.zeros(1000)  # 4000 bytes
        view = first.view(10, 100)[2:]
        assert counted.live == 4000
        second = first + 1
        assert counted.live == counted.peak == 8000
        del first, view
        assert counted.live == 4000
        del second
    assert counted.live == 0
    assert counted.peak == 8000


def test_what_a_backward_keeps_alive_is_seen():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)
    with LiveTensorMeter() as counted:
        loss = (x @ weight).relu().sum()
        held = counted.live  # the product is saved by relu as its own output: one of the two stays
        assert held >= 50 * 100 * 4
        loss.backward()
    assert counted.peak >= held + 100 * 100 * 4


def test_peak_memory_is_that_of_a_process():
    begin_peak()
    assert set(peak_memory()) == {"peak_memory_gib"}
    assert 0.01 < peak_memory()["peak_memory_gib"] < 100


def test_on_a_gpu_a_peak_is_that_since_the_last_record(monkeypatch):
    peaks = {"allocated": 5 * GIB, "reserved": 6 * GIB}
    monkeypatch.setattr(meter.distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peaks["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(allocated=GIB, reserved=2 * GIB))
    assert peak_memory() == {"peak_memory_gib": 5, "peak_reserved_gib": 6}
    begin_peak()
    assert peak_memory() == {"peak_memory_gib": 1, "peak_reserved_gib": 2}
