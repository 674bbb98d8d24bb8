"""That fake CUDA sees what a GPU would wait for or refuse, and only that."""

from __future__ import annotations

import pytest

from fake_cuda.run import on_fake_cuda

WAITING = [
    *("item", "bool", "tolist", "cpu", "nonzero", "equal", "mask as index", "values for a mask", "index of the host"),
    *("from the host", "new from a list", "copied from the host"),
]
NOT_WAITING = [
    *("sums", "fill by a mask", "choose by a mask", "index", "a number of the host", "from pinned memory"),
    *("made there", "other precision"),
]
REFUSED = {
    "sum over devices": "expected all tensors to be on the same device",
    "tensor of the host by an index of the GPU": "indices should be either on cpu or on the same device",
    "tensor of the host by a mask of the GPU": "indices should be either on cpu or on the same device",
    "numpy": "not supported",
}


@pytest.fixture(scope="module")
def facts():
    cases = [{"name": name} for name in [*WAITING, *NOT_WAITING, *REFUSED]]
    return on_fake_cuda("fake_cuda.detection:seen", cases)


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_seen(facts, name):
    found = facts.of(name=name)
    assert len(found["waits"]) == 1
    assert found["error"] is None


@pytest.mark.parametrize("name", NOT_WAITING)
def test_no_wait_is_made_up(facts, name):
    assert facts.of(name=name) == {"waits": [], "error": None}


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_in_one_operation_are_refused(facts, name):
    assert REFUSED[name] in facts.of(name=name)["error"]
