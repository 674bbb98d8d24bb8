"""The meter of live tensor bytes."""

from __future__ import annotations

import torch

from coconut_ds.memory.meter import LiveTensorMeter, peak_memory_gib


def test_bytes_are_counted_once_and_given_back():
    with LiveTensorMeter() as meter:
        first = torch.zeros(1000)  # 4000 bytes
        view = first.view(10, 100)[2:]
        assert meter.live == 4000
        second = first + 1
        assert meter.live == meter.peak == 8000
        del first, view
        assert meter.live == 4000
        del second
    assert meter.live == 0
    assert meter.peak == 8000


def test_what_a_backward_keeps_alive_is_seen():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(50, 100)
    with LiveTensorMeter() as meter:
        loss = (x @ weight).relu().sum()
        held = meter.live  # the product is saved by relu as its own output: one of the two stays
        assert held >= 50 * 100 * 4
        loss.backward()
    assert meter.peak >= held + 100 * 100 * 4


def test_peak_memory_is_that_of_a_process():
    assert 0.01 < peak_memory_gib() < 100
