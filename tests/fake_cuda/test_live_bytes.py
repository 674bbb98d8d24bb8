"""The count of live bytes under a GPU's attention, against what its kernel does not keep."""

from __future__ import annotations

import itertools

import pytest

from fake_cuda.run import on_fake_cuda

LAYERS, HEADS, ROWS, COLUMNS = 3, 4, 4, 100
SHAPE = {"rows": ROWS, "prefix": 80, "thoughts": 2, "tail": 18}
MODEL = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": 64, "n_positions": COLUMNS, "vocab_size": 200}
BYTES = {"float16": 2, "float32": 4}
CASES = [
    {"dtype": dtype, "recomputed": recomputed, "fused": fused, **SHAPE, "model": MODEL}
    for dtype, recomputed, fused in itertools.product(BYTES, (True, False), (True, False))
]


@pytest.fixture(scope="module")
def facts():
    return on_fake_cuda("fake_cuda.live_bytes:peak", CASES)


@pytest.mark.parametrize("dtype", BYTES)
def test_the_fused_kernel_keeps_nothing_of_the_size_of_columns_times_columns(facts, dtype):
    fused, plain = (
        facts.of(dtype=dtype, recomputed=False, fused=fused, **SHAPE, model=MODEL) for fused in (True, False)
    )
    square = ROWS * HEADS * COLUMNS * COLUMNS * BYTES[dtype]
    assert plain - fused > LAYERS * square


@pytest.mark.parametrize("dtype", BYTES)
def test_recomputing_keeps_less(facts, dtype):
    kept, recomputed = (
        facts.of(dtype=dtype, recomputed=recomputed, fused=True, **SHAPE, model=MODEL) for recomputed in (False, True)
    )
    assert recomputed < 0.8 * kept


@pytest.mark.parametrize("recomputed", [True, False])
def test_half_precision_takes_about_half(facts, recomputed):
    half, single = (facts.of(dtype=dtype, recomputed=recomputed, fused=True, **SHAPE, model=MODEL) for dtype in BYTES)
    assert 0.45 * single < half < 0.65 * single
