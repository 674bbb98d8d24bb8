"""A run with nothing left open, made once: (run file, DeepSpeed file, device, ranks) -> DraftRun -> ResolvedRun.

A DraftRun is all that can be known before the model is there. `batch_size_training: auto` is measured on the loaded
model (`memory/batch_size.py`); `with_micro_batch` closes the draft with the number. Both functions are pure. Keys of
the run file that may say `auto` are read in here alone; whatever runs later reads the fields below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from coconut_ds.config.batch_sizes import BatchSizes, batch_sizes
from coconut_ds.config.deepspeed_config import (
    Device,
    Precision,
    batch_keys,
    resolve_checkpointing,
    resolve_ds_config,
    resolve_precision,
)
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import ActivationCheckpointingConfig


@dataclass(frozen=True)
class _Known:
    config: RunConfig
    """The values of the run, as `run_config.yaml` records them: checkpointing is resolved and the micro-batch a number
    once it is known; precision and `eval_batch_size` stay as asked for, since the file may be used on other machines.
    """
    precision: Precision
    checkpointing: ActivationCheckpointingConfig
    ds_config: dict[str, Any]
    """For `deepspeed.initialize`."""
    sizes: BatchSizes
    eval_rows: int | None
    """Examples per rank in a decoding batch; None: measured once everything else is on the device."""


@dataclass(frozen=True)
class DraftRun(_Known):
    """A run before its model is loaded. While `is_measured` is false, sizes count one example per micro-batch."""

    is_measured: bool


@dataclass(frozen=True)
class ResolvedRun(_Known):
    """A run as it is trained, recorded and reported."""


def resolve(
    config: RunConfig, ds_json: dict[str, Any], device: Device, world: int, run_file: str = "the run YAML"
) -> DraftRun:
    """Settle all that needs no model; `ds_json` is what `config.deepspeed` holds, `run_file` is named in messages.

    Raises ConfigError where the batch does not divide over `world` ranks, DeepSpeedConfigError for what cannot be used.
    """
    sizes = batch_sizes(config, world)
    checkpointing = resolve_checkpointing(ds_json, config)
    return DraftRun(
        RunConfig(**(dict(config) | {"activation_checkpointing": checkpointing})),
        resolve_precision(config, device),
        checkpointing,
        resolve_ds_config(ds_json, config, sizes, device, run_file),
        sizes,
        None if config.eval_batch_size == "auto" else config.eval_batch_size,
        is_measured=config.batch_size_training != "auto",
    )


def with_micro_batch(draft: DraftRun, micro: int) -> ResolvedRun:
    """The run with micro-batches of `micro` examples, which must divide the examples of a rank's optimizer step."""
    world = draft.sizes.world
    sizes = BatchSizes(micro, draft.sizes.total // (micro * world), world)
    known = {field.name: getattr(draft, field.name) for field in fields(_Known)}
    known |= {
        "config": RunConfig(**(dict(draft.config) | {"batch_size_training": micro})),
        "ds_config": draft.ds_config | batch_keys(sizes),
        "sizes": sizes,
    }
    return ResolvedRun(**known)
