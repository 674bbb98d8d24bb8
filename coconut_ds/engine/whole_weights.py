"""ZeRO-3's weights, whole on every rank for as long as an evaluation lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed


@contextmanager
def whole_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside it the module works on each rank by itself, like any other; called on every rank.

    Under ZeRO-3 every layer otherwise gathers its weights from all ranks, so that all would have to decode the same
    number of batches and tokens. At other stages the weights are whole anyway.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    # There is no public call that switches the gathering off.
    hooks = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        hooks._remove_module_hooks()
        hooks.forward_hooks.clear()
        hooks.backward_hooks.clear()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()
