"""Refuses what DeepSpeed would ignore or cannot use in a file of `ds_configs/`.

Unknown keys are refused because DeepSpeed drops them in silence; values are checked by DeepSpeed's own schema if a
section has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfigError as DeepSpeedError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, Field, ValidationError

from coconut_ds.config.foreign_keys import known_elsewhere
from coconut_ds.errors import did_you_mean

MEMORY_KEYS = frozenset(
    """zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16 bfloat16 fp16 data_types
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather steps_per_print
    wall_clock_breakdown memory_breakdown dump_state comms_logger flops_profiler""".split()
)
"""Top-level keys of DeepSpeed that may stand in a ds JSON beside those owned by the run YAML."""

OWNED_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    managed_gradient_accumulation activation_checkpointing""".split()
)


class _FP16(DeepSpeedFP16Config):
    initial_scale_power: int = Field(16, ge=0, le=127)
    """The loss scale, 2 to this power, is an fp32 number: of a larger one DeepSpeed makes an OverflowError."""


_SCHEMAS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": _FP16,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
}
_KEYS_WITHOUT_SCHEMA = {
    "data_types": ["grad_accum_dtype"],
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file".split(),
}

_REFUSED_KEYS = {
    "aio": "it is for NVMe, which is not supported",
    "checkpoint": "checkpoints are written by this trainer (docs/RELIABILITY.md)",
    "elasticity": "DeepSpeed 0.19 removed it",
    "torch_autocast": "it is global to the process and outlives the engine; set precision in the run YAML",
    "amp": "DeepSpeed 0.19 removed it; set precision in the run YAML",
    "tensorboard": "records belong to metrics.jsonl and wandb",
    "wandb": "set wandb in the run YAML",
    "csv_monitor": "records belong to metrics.jsonl",
}


IGNORED_SECTIONS = frozenset({"comms_config", "monitor_config"})
"""They stand in files of other trainers, and DeepSpeed has no such sections."""


def without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def schema_problems(raw: dict[str, Any]) -> Iterator[str]:
    """Unknown keys and unusable values inside the sections."""
    for section, value in raw.items():
        if section in (*_SCHEMAS, *_KEYS_WITHOUT_SCHEMA) and not isinstance(value, dict):
            if value != "auto" and section != "zero_optimization":
                yield f"{section}: {value!r} must be an object"
        elif section in (*_SCHEMAS, *_KEYS_WITHOUT_SCHEMA) and "strict" in value:
            yield f"{section}.strict: unknown key"
        elif section in _SCHEMAS:
            yield from _against_schema(section, _SCHEMAS[section], without_auto(value))
        elif section in _KEYS_WITHOUT_SCHEMA:
            known = _KEYS_WITHOUT_SCHEMA[section]
            for key in value:
                if key not in known:
                    yield f"{section}.{key}: unknown key, which DeepSpeed would ignore{did_you_mean(key, known)}"


def _against_schema(section: str, schema: type[BaseModel], values: dict[str, Any]) -> Iterator[str]:
    try:
        schema(**values)
    except ValidationError as error:
        # Of fields with two names the one that stands in most files.
        names = [field.alias or name for name, field in schema.model_fields.items()]
        for item in error.errors():
            key = ".".join((section, *map(str, item["loc"])))
            if item["type"] == "extra_forbidden":
                yield f"{key}: unknown key{did_you_mean(str(item['loc'][-1]), names)}"
            else:
                yield f"{key}: {item['input']!r}: {item['msg']}"
    except DeepSpeedError as error:
        yield f"{section}: {error}"


def unknown_keys(raw: dict[str, Any]) -> Iterator[str]:
    known = MEMORY_KEYS | OWNED_KEYS
    for key, value in raw.items():
        # As in JSONs for the HF Trainer, which list sections for completeness: switched off, or left to the run.
        is_off = isinstance(value, dict) and value.get("enabled") in (False, "auto")
        if key in _REFUSED_KEYS and not is_off:
            yield f"{key}: refused: {_REFUSED_KEYS[key]}"
        elif key not in known | _REFUSED_KEYS.keys() | IGNORED_SECTIONS:
            hint = known_elsewhere(key, "ds") or did_you_mean(key, known)
            if key in DeepSpeedZeroConfig.model_fields:
                hint = "; it belongs in zero_optimization"
            yield f"{key}: unknown key, which DeepSpeed would ignore{hint}"
