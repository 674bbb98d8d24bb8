"""Pure: (ds_configs JSON, RunConfig, batch sizes, device) -> the final DeepSpeed dict.

The run YAML owns training values, the JSON owns the memory strategy and may say "auto" for the rest. Every "auto" is
resolved here, because DeepSpeed drops the ones it does not know in silence; unknown keys are refused for the same
reason, by DeepSpeed's own schema where a section has one. Evidence for each refusal: `docs/ZERO.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfigError as DeepSpeedError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from coconut_ds.config.foreign_keys import known_elsewhere
from coconut_ds.config.run_config import ActivationCheckpointingConfig, BatchSizes, RunConfig
from coconut_ds.errors import InputError, did_you_mean, problem_list

Precision = Literal["fp32", "bf16", "fp16"]
_PACKAGE = Path(__file__).resolve().parent.parent

MEMORY_KEYS = frozenset(
    """zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16 bfloat16 fp16 data_types
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather steps_per_print
    wall_clock_breakdown memory_breakdown dump_state comms_logger flops_profiler""".split()
)
"""Top-level keys of DeepSpeed that may stand in a ds JSON beside those owned by the run YAML."""

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OWNED_KEYS = frozenset(
    (
        *_BATCH_KEYS,
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "managed_gradient_accumulation",
        "activation_checkpointing",
    )
)

_CHECKPOINTING_REFUSED = {
    "partition_activations": "it divides activations among model-parallel ranks, and there are none here",
    "contiguous_memory_optimization": "it wants activations of one shape, and the passes differ in theirs",
    "number_checkpoints": "it only sizes the buffer of contiguous_memory_optimization; for fewer checkpoints set "
    "activation_checkpointing.every_n_layers in the run YAML",
    "synchronize_checkpoint_boundary": "it makes the host wait at every layer of every pass",
    "profile": "it times DeepSpeed's own checkpoint function, which is not used; see benchmarks/train_step.py",
}

_SCHEMAS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
}
_KEYS_WITHOUT_SCHEMA = {
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
}

_FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
_REPLACED = {
    "cpu_offload": 'write offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'write offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "write pin_memory inside offload_optimizer and offload_param",
}

_AUTO_KEYS = (
    "optimizer",
    "optimizer.params",
    "optimizer.params.adam_w_mode",
    "optimizer.params.torch_adam",
    "scheduler",
    "scheduler.params",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.warmup_type",
    "scheduler.params.total_num_steps",
    "scheduler.params.last_batch_iteration",
)
"""Keys of training values that are the run's in any case, so that only "auto" can stand there."""

DEFAULT_BUCKETS = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
"""Elements that DeepSpeed 0.19.8 takes where a file names none."""

SMALL_BUCKETS = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
}
"""Elements that "auto" stands for: the values of `ds_configs/`."""

_AUTO_VALUES = SMALL_BUCKETS | {"stage3_param_persistence_threshold": 100_000}
"""What "auto" stands for: the values of `ds_configs/`, where DeepSpeed's own would take up to 1.9 GiB."""

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


@dataclass(frozen=True)
class Device:
    """What the configuration has to know about the device."""

    kind: Literal["cpu", "cuda"]
    has_bf16: bool
    has_fp16: bool


class DeepSpeedConfigError(InputError):
    """Everything wrong with a ds JSON, or with it and the run YAML together, found in one pass."""


def ds_json_path(name: str | Path) -> Path:
    """The file that `deepspeed: NAME` means: NAME as it is given, else the one that the package brings along.

    `ds_configs/` is a folder of the checkout and, by a link, of the package, so an installed trainer has it too.
    """
    path, shipped = Path(name), _PACKAGE / name
    return shipped if path.parts[:1] == ("ds_configs",) and shipped.is_file() and not path.exists() else path


def shipped_ds_jsons() -> list[str]:
    """The names under which the files of `ds_configs/`, here and in the package, can be given."""
    return sorted({f"ds_configs/{file.name}" for root in (Path(), _PACKAGE) for file in root.glob("ds_configs/*.json")})


def read_ds_json(path: str | Path) -> dict[str, Any]:
    """Read a ds JSON file, found as `ds_json_path` says; raises DeepSpeedConfigError for what is not a JSON object."""
    try:
        raw = json.loads(ds_json_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(shipped_ds_jsons())
        raise DeepSpeedConfigError(
            f"deepspeed file {path} cannot be read: {error.strerror}; name one of {known}"
        ) from None
    except ValueError as error:
        raise DeepSpeedConfigError(f"deepspeed file {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DeepSpeedConfigError(f"deepspeed file {path} must hold a JSON object, found {type(raw).__name__}")
    return raw


def resolve_precision(config: RunConfig, device: Device) -> Precision:
    """The precision to train in; raises DeepSpeedConfigError where the device has no such arithmetic."""
    wanted = config.precision or ("bf16" if config.bf16 else "fp32")
    if wanted == "auto":
        if device.has_bf16 and device.kind == "cuda":
            return "bf16"
        return "fp16" if device.kind == "cuda" and device.has_fp16 else "fp32"
    has = {"fp16": device.has_fp16, "fp32": True, "bf16": device.has_bf16}
    if not has[wanted]:
        needed = " (needs capability 8.0)" if wanted == "bf16" else ""
        instead = " or ".join(name for name, is_there in has.items() if is_there)
        raise DeepSpeedConfigError(f"precision: {wanted}, but this device has none{needed}; use {instead}")
    return wanted


def resolve_ds_config(
    raw: dict[str, Any], config: RunConfig, sizes: BatchSizes, device: Device, run_file: str = "the run YAML"
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, with every "auto" resolved and training values taken from the run.

    Raises DeepSpeedConfigError listing unknown keys, clashes between the two files, and combinations known to break.
    """
    precision = resolve_precision(config, device)
    zero = _as_deepspeed_reads(_with_small_buckets(raw.get("zero_optimization", {})))
    problems = [
        *_unknown_keys(raw),
        *_clashes(raw, config, sizes, precision, run_file),
        *_broken_combinations(zero, raw, precision),
        *_checkpointing_problems(raw, config, run_file),
        *_schema_problems(raw),
    ]
    if problems:
        raise DeepSpeedConfigError(problem_list(config.deepspeed, problems))
    resolved = {key: _without_auto(value) for key, value in raw.items() if key in MEMORY_KEYS and value != "auto"}
    resolved.pop("bfloat16", None)
    resolved |= {
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        # Windows end where an epoch ends, so the loop and not DeepSpeed's counter says when to step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {**resolved.get("bf16", {}), "enabled": precision == "bf16"},
        "fp16": {**resolved.get("fp16", {}), "enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
    }
    return {"steps_per_print": 2**31 - 1} | resolved


def resolve_checkpointing(raw: dict[str, Any], config: RunConfig) -> ActivationCheckpointingConfig:
    """The checkpointing to train with: the run YAML's, else what the ds JSON's `activation_checkpointing` block means.

    DeepSpeed itself does nothing on such a block: it configures its own checkpoint function, which a model has to call.
    A block that `resolve_ds_config` let through stands for checkpointing of every layer, with `cpu_checkpointing` for
    offload.
    """
    block = raw.get("activation_checkpointing")
    if config.activation_checkpointing is not None:
        return config.activation_checkpointing
    if not isinstance(block, dict):
        return ActivationCheckpointingConfig(enabled=False)
    return ActivationCheckpointingConfig(offload=block.get("cpu_checkpointing") is True)


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Whether optimizer states live in host memory."""
    return _offload_device(ds_config["zero_optimization"], "offload_optimizer") != "none"


def _offload_device(zero: dict[str, Any], section: str) -> str:
    settings = zero.get(section)
    return settings.get("device", "none") if isinstance(settings, dict) else "none"


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _with_small_buckets(zero: Any) -> Any:
    if not isinstance(zero, dict):
        return zero
    return _without_auto(
        {key: _AUTO_VALUES.get(key, value) if value == "auto" else value for key, value in zero.items()}
    )


_ZERO_ALIASES = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}


def _as_deepspeed_reads(zero: Any) -> Any:
    """Keys under the names that stand in most files, numbers and switches written as text as what they are."""
    if not isinstance(zero, dict):
        return zero
    named = {_ZERO_ALIASES.get(key, key): value for key, value in zero.items() if value is not None}
    return {key: _of_text(value) if isinstance(value, str) else value for key, value in named.items()}


def _of_text(value: str) -> Any:
    try:
        read = json.loads(value.strip().lower())
    except ValueError:
        return value
    return int(read) if isinstance(read, float) and read.is_integer() else read


def _schema_problems(raw: dict[str, Any]) -> Iterator[str]:
    """Unknown keys and unusable values inside the sections."""
    for section, value in raw.items():
        if section in (*_SCHEMAS, *_KEYS_WITHOUT_SCHEMA) and not isinstance(value, dict):
            if value != "auto" and section != "zero_optimization":
                yield f"{section}: {value!r} must be an object"
        elif section in (*_SCHEMAS, *_KEYS_WITHOUT_SCHEMA) and "strict" in value:
            yield f"{section}.strict: unknown key"
        elif section in _SCHEMAS:
            yield from _against_schema(section, _SCHEMAS[section], _without_auto(value))
        elif section in _KEYS_WITHOUT_SCHEMA:
            known = _KEYS_WITHOUT_SCHEMA[section]
            for key in value:
                if key not in known:
                    yield f"{section}.{key}: unknown key, which DeepSpeed would ignore{did_you_mean(key, known)}"


def _against_schema(section: str, schema: type[BaseModel], values: dict[str, Any]) -> Iterator[str]:
    try:
        schema(**values)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join((section, *map(str, item["loc"])))
            if item["type"] == "extra_forbidden":
                yield f"{key}: unknown key{did_you_mean(str(item['loc'][-1]), _known_names(schema))}"
            else:
                yield f"{key}: {item['input']!r}: {item['msg']}"
    except DeepSpeedError as error:
        yield f"{section}: {error}"


def _known_names(schema: type[BaseModel]) -> list[str]:
    """Of fields with two names the one that stands in most files."""
    return [field.alias or name for name, field in schema.model_fields.items()]


def _is_off(section: Any) -> bool:
    """Whether it is there for completeness only, as in JSONs for the HF Trainer: switched off, or left to the run."""
    return isinstance(section, dict) and section.get("enabled") in (False, "auto")


def _unknown_keys(raw: dict[str, Any]) -> Iterator[str]:
    for key in raw:
        if key in _REFUSED_KEYS and not _is_off(raw[key]):
            yield f"{key}: refused: {_REFUSED_KEYS[key]}"
        elif key not in MEMORY_KEYS | _OWNED_KEYS | _REFUSED_KEYS.keys():
            yield f"{key}: unknown key, which DeepSpeed would ignore{_hint(key)}"


def _hint(key: str) -> str:
    """For an unknown key at the top level."""
    if key in DeepSpeedZeroConfig.model_fields:
        return "; it belongs in zero_optimization"
    return known_elsewhere(key, "ds") or did_you_mean(key, MEMORY_KEYS | _OWNED_KEYS)


def _clashes(
    raw: dict[str, Any], config: RunConfig, sizes: BatchSizes, precision: Precision, run_file: str
) -> Iterator[str]:
    owned = {
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": config.max_grad_norm,
        "managed_gradient_accumulation": False,
        "bf16.enabled": precision == "bf16",
        "bfloat16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
        "optimizer.type": ("AdamW", "Adam"),
        "optimizer.params.lr": config.lr,
        "optimizer.params.betas": list(config.adam_betas),
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": config.weight_decay,
        "scheduler.type": ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"),
    }
    for key, value in _leaves(raw):
        section = key.split(".")[0]
        if key in owned:
            wanted = owned[key]
            if value != "auto" and value != wanted and not (isinstance(wanted, tuple) and value in wanted):
                yield f'{key}: {value!r} here, but {wanted!r} follows from {run_file}; write "auto" here'
        elif section in ("optimizer", "scheduler") and value != "auto":
            yield f'{key}: {value!r} here, but {run_file} owns training values; write "auto" here and set it there'
        elif section in ("optimizer", "scheduler") and key not in _AUTO_KEYS:
            yield f"{key}: unknown key{did_you_mean(key, (*owned, *_AUTO_KEYS))}"


def _checkpointing_problems(raw: dict[str, Any], config: RunConfig, run_file: str) -> Iterator[str]:
    name = "activation_checkpointing"
    block, wanted = raw.get(name, "auto"), config.activation_checkpointing
    if block == "auto":
        return
    if not isinstance(block, dict):
        yield f"{name}: {block!r} must be an object"
        return
    for key, value in block.items():
        if key in _CHECKPOINTING_REFUSED and value not in (False, None, "auto"):
            yield f"{name}.{key}: {value!r}: refused: {_CHECKPOINTING_REFUSED[key]}; remove it"
        elif key not in (*_CHECKPOINTING_REFUSED, "cpu_checkpointing"):
            hint = did_you_mean(key, (*_CHECKPOINTING_REFUSED, "cpu_checkpointing"))
            yield f"{name}.{key}: unknown key, which DeepSpeed would ignore{hint}"
    if wanted is not None and not wanted.enabled:
        yield f"{name}: a block here, but {run_file} has {name}.enabled: false; drop one of them"
    if config.fast == "off":
        yield f"{name}: a block here, but {run_file} has fast: off, whose passes keep all activations; drop one of them"
    offload = block.get("cpu_checkpointing", "auto")
    if offload not in (True, False, "auto"):
        yield f"{name}.cpu_checkpointing: {offload!r} must be true or false"
    elif wanted is not None and offload not in ("auto", wanted.offload):
        yield (
            f'{name}.cpu_checkpointing: {offload!r} here, but {wanted.offload!r} follows from {run_file}; write "auto" '
            "here"
        )


def _leaves(raw: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _broken_combinations(zero: Any, raw: dict[str, Any], precision: Precision) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield f"zero_optimization: {zero!r} must be an object with a stage"
        return
    stage = zero.get("stage", 0)
    offload = _offload_device(zero, "offload_optimizer")
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage: {stage!r}: must be 0, 1, 2 or 3; see ds_configs/"
    if stage == 0 and precision == "fp16":
        yield "zero_optimization.stage: 0 with fp16 trains on unscaled losses in DeepSpeed 0.19.8; use stage 1 or fp32"
    if stage == 0 and offload != "none":
        yield "zero_optimization.offload_optimizer: DeepSpeed ignores it at stage 0; use stage 1 or 2"
    if stage != 3 and _offload_device(zero, "offload_param") != "none":
        yield "zero_optimization.offload_param: DeepSpeed ignores it below stage 3; use stage 3 or remove it"
    for section in ("offload_optimizer", "offload_param"):
        if _offload_device(zero, section) == "nvme":
            yield f"zero_optimization.{section}.device: nvme is not supported; use cpu"
    for old, new in _REPLACED.items():
        if old in zero:
            yield f"zero_optimization.{old}: is deprecated in DeepSpeed; {new}"
    if stage == 1 and zero.get("overlap_comm"):
        yield "zero_optimization.overlap_comm: true is not possible at stage 1 with windows of our own; set it to false"
    if zero.get("round_robin_gradients"):
        yield (
            "zero_optimization.round_robin_gradients: on several ranks DeepSpeed 0.19.8 then hands out the fp32 "
            "weights of other parameters, so an exported bf16 or fp16 model would be wrong; set it to false"
        )
    data_types = raw.get("data_types")
    accumulation_dtype = data_types.get("grad_accum_dtype") if isinstance(data_types, dict) else None
    if offload != "none" and precision == "fp16" and accumulation_dtype in _FP32_NAMES:
        yield (
            "data_types.grad_accum_dtype: fp32 with fp16 and an offloaded optimizer never recovers from an overflow in "
            "DeepSpeed 0.19.8; remove it"
        )
