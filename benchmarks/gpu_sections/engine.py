"""The engine with every ZeRO file and precision: steps beside plain torch, overflows, resets, checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coconut_ds.checkpoints.store import Checkpoints, Progress, Stored, restore
from coconut_ds.config.run_config import RunConfig
from coconut_ds.engine.build import start_process_group
from coconut_ds.engine.internals import loss_scale
from coconut_ds.engine.reset import new_schedule, reset_optimizer_state
from coconut_ds.engine.states import gather, updates_done
from coconut_ds.engine.states import restore as restore_states
from coconut_ds.model.backbone import Backbone
from coconut_ds.model.folder import context_settings
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.training.step import optimizer_step
from gpu_sections import Row, begin, engines, left_out, tried

_STEPS, _EXAMPLES = 3, 12
_LOSS_NEAR = {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.02}
_WEIGHT_NEAR = {"fp32": 5e-4, "fp16": 0.015, "bf16": 0.015}
"""A weight moves by 3e-3 a step, in a direction that hangs on the last digits of small gradients."""
_MOST_OVERFLOWS = 40


def rows(options: argparse.Namespace) -> Iterator[Row]:
    # cuBLAS reads it when CUDA starts, and without it `deterministic` raises.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    begin(options)
    start_process_group()
    for precision, file in itertools.product(engines.PRECISIONS, engines.FILES):
        yield _where_it_can(f"steps: {file} {precision}", _steps, file, precision)
    for file in ("zero1", "zero2", "zero2_offload", "zero3"):
        yield _where_it_can(f"overflow: {file}", _overflows, file, "fp16")
    files = ("zero0", "zero2_offload") if options.toy else engines.FILES
    for file in files:
        yield _where_it_can(f"reset is a fresh optimizer: {file}", _reset, file, "fp32")
    for file in files:
        yield _where_it_can(f"restored continues: {file}", functools.partial(_restored, options.work), file, "fp32")
    for precision in ("fp16", "bf16"):
        continues = functools.partial(_restored, options.work)
        yield _where_it_can(f"restored continues: zero2_offload {precision}", continues, "zero2_offload", precision)


def _where_it_can(name: str, work: Any, file: str, precision: str) -> Row:
    why = engines.lacks(file, precision)
    return left_out(name, why) if why else tried(name, work, file, precision)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Context in which torch takes deterministic kernels alone, and raises where it has none."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _losses(engine: Any, steps: list[Any]) -> list[float]:
    return [optimizer_step(engine, batches, "token").loss for batches in steps]


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights in fp32."""
    return {name: value.clone() for name, value in gather(engine).items()}


def _steps(file: str, precision: str) -> Row:
    """Losses and weights of three steps in micro-batches of two, beside undivided ones in plain torch and fp32."""
    expected, weights, moved = engines.plain_steps(engines.undivided(_EXAMPLES, 4))
    engine = engines.engine(file, precision)
    losses = _losses(engine, engines.steps_of(file, _EXAMPLES, 4, 2))
    final = _weights(engine)
    loss_error = max(abs(mine - other) for mine, other in zip(losses, expected, strict=True))
    worst = max(float((final[name].cpu() - weights[name])[moved[name]].abs().max()) for name in weights)
    ok = loss_error < _LOSS_NEAR[precision] and worst < _WEIGHT_NEAR[precision]
    return {"ok": ok, "loss_error": loss_error, "weight_error": worst}


def _overflows(file: str, precision: str) -> Row:
    """From a loss scale of 2**32 steps are skipped, until the scale is low enough and one is applied."""
    engine = engines.engine(file, precision, scale_power=32)
    batches = engines.steps_of(file, 4, 4, 2)[0]
    for skipped in range(_MOST_OVERFLOWS):
        optimizer_step(engine, batches, "token")
        if engine.was_step_applied():
            return {"ok": skipped > 0, "skipped": skipped, "scale": loss_scale(engine)}
    return {"ok": False, "skipped": _MOST_OVERFLOWS, "scale": loss_scale(engine)}


def _reset(file: str, precision: str) -> Row:
    """After a reset an engine goes the way of a fresh one on the same weights, bit for bit."""
    steps = engines.steps_of(file, _EXAMPLES, 4, 2)
    with deterministic():
        engine = engines.engine(file, precision)
        _losses(engine, steps)
        weights = _weights(engine)
        reset_optimizer_state(engine)
        continued = _losses(engine, steps)
        fresh = engines.engine(file, precision, engines.model(weights))
        restore_states(fresh, 0, weights, {})
        expected = _losses(fresh, steps)
        mine, other = _weights(engine), _weights(fresh)
    apart = max(float((mine[name] - other[name]).abs().max()) for name in other)
    return {"ok": continued == expected and apart == 0, "losses_equal": continued == expected, "weights_apart": apart}


def _restored(work: Path, file: str, precision: str) -> Row:
    """Losses after a restore against those without one: equal with deterministic kernels, else the difference."""
    apart = {}
    for kernels, context in (("deterministic", deterministic()), ("default", contextlib.nullcontext())):
        with context:
            engine, folder = engines.engine(file, precision), work / f"{file}_{precision}_{kernels}"
            steps = engines.steps_of(file, 16, 4, 2)
            _losses(engine, steps[:2])
            path, weights = _saved(engine, folder), _weights(engine)
            expected = _losses(engine, steps[2:])
            again = engines.engine(file, precision, engines.model(weights))
            restore(path, again)
            found = _losses(again, steps[2:])
        apart[kernels] = max(abs(mine - other) for mine, other in zip(found, expected, strict=True))
    return {"ok": apart["deterministic"] == 0, "losses_apart": apart}


def _saved(engine: Any, folder: Path) -> Path:
    schedule = new_schedule(engine, RunConfig(lr=engines.RATE, warmup_steps=0), 10)
    backbone = Backbone(engine.module.base_causallm, word_tokenizer(["a b"], 96))
    stored = Stored(Progress(epochs=1, step=2), 4, 0, updates_done(engine), schedule.last_epoch, loss_scale(engine))
    settings = {"latent_context": context_settings(engine.module.latent_context)}
    return Checkpoints(folder, keep=None).save(engine, backbone, settings, stored)
