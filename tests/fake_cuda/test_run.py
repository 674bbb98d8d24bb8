"""How the process with fake CUDA is built and started."""

from __future__ import annotations

import threading

import pytest
import torch

from fake_cuda import library
from fake_cuda.run import on_fake_cuda


def test_two_builds_at_once_leave_one_library(monkeypatch, tmp_path):
    library.library()  # skips where it cannot be built
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    builders = [threading.Thread(target=lambda: found.append(library.library())) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(set(found)) == 1
    assert list(found[0].parent.iterdir()) == [found[0]]


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match="needs a C\\+\\+ compiler"):
        library.library()


def test_a_case_that_fails_fails_its_test_only():
    facts = on_fake_cuda("fake_cuda.device:choose_attention", [{"backend": 0}, {"backend": "none"}])
    assert facts.of(backend=0) is None
    with pytest.raises(AssertionError, match="TypeError"):
        facts.of(backend="none")


def test_cases_that_were_not_reached_fail():
    facts = on_fake_cuda("fake_cuda.no_such_module:name", [{}])
    with pytest.raises(AssertionError, match=r"did not run:[\s\S]*No module named 'fake_cuda.no_such_module'"):
        facts.of()
