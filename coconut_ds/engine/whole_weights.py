"""ZeRO-3's weights, whole on every rank for as long as an evaluation lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed

from coconut_ds.engine.internals import gathering_switched_off


@contextmanager
def whole_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside it the module works on each rank by itself, like any other; called on every rank.

    Under ZeRO-3 every layer otherwise gathers its weights from all ranks, so that all would have to decode the same
    number of batches and tokens. At other stages the weights are whole anyway.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), gathering_switched_off(engine):
        yield
