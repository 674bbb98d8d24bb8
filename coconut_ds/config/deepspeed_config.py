"""Pure: (ds_configs JSON, RunConfig, batch sizes, device) -> the final DeepSpeed dict.

The run YAML owns training values, the JSON owns the memory strategy and may say "auto" for the rest. Every "auto" is
resolved here, because DeepSpeed drops the ones it does not know in silence. Evidence for each refusal: `docs/ZERO.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_file import (
    IGNORED_SECTIONS,
    MEMORY_KEYS,
    schema_problems,
    unknown_keys,
    without_auto,
)
from coconut_ds.config.ds_json import DeepSpeedConfigError, leaves
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import ActivationCheckpointingConfig
from coconut_ds.errors import did_you_mean, problem_list

Precision = Literal["fp32", "bf16", "fp16"]
_CHECKPOINTING_REFUSED = {
    "partition_activations": "it divides activations among model-parallel ranks, and there are none here",
    "contiguous_memory_optimization": "it wants activations of one shape, and the passes differ in theirs",
    "number_checkpoints": "it only sizes the buffer of contiguous_memory_optimization; for fewer checkpoints set "
    "activation_checkpointing.every_n_layers in the run YAML",
    "synchronize_checkpoint_boundary": "it synchronises with the device at every layer of every pass",
    "profile": "it times DeepSpeed's own checkpoint function, which is not used; see benchmarks/train_step.py",
}

_REPLACED = {
    "cpu_offload": 'write offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'write offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "write pin_memory inside offload_optimizer and offload_param",
}

_AUTO_KEYS = """optimizer optimizer.params optimizer.params.adam_w_mode optimizer.params.torch_adam scheduler
    scheduler.params scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.warmup_type scheduler.params.total_num_steps scheduler.params.last_batch_iteration""".split()
"""Keys of training values that are the run's in any case, so that only "auto" can stand there."""

SMALL_BUCKETS = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
}
"""Elements that "auto" stands for, and no value: those of `ds_configs/`. DeepSpeed's own take 0.9 GiB and more."""

_IGNORED_KEYS = {
    "optimizer.params.torch_adam": "the optimizer is this trainer's AdamW",
    "zero_optimization.round_robin_gradients": "it is off, as DeepSpeed 0.19.8 then mixes up fp32 weights of ranks",
}

FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
"""What DeepSpeed reads as fp32 in `data_types`."""

_AUTO_VALUES = SMALL_BUCKETS | {"stage3_param_persistence_threshold": 100_000}
"""What "auto" stands for."""


@dataclass(frozen=True)
class Device:
    """Properties of the device that the configuration depends on."""

    kind: Literal["cpu", "cuda"]
    has_bf16: bool
    has_fp16: bool


def resolve_precision(config: RunConfig, device: Device) -> Precision:
    """The precision to train in; raises DeepSpeedConfigError if the device does not support it."""
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
    zero = _with_buckets(_as_deepspeed_reads(raw.get("zero_optimization", {})))
    problems = [
        *unknown_keys(raw),
        *_clashes(raw, config, sizes, precision, run_file),
        *_broken_combinations(zero, raw, precision),
        *_checkpointing_problems(raw, config, run_file),
        *schema_problems(raw),
    ]
    if problems:
        raise DeepSpeedConfigError(problem_list(config.deepspeed, problems))
    resolved = {key: without_auto(value) for key, value in raw.items() if key in MEMORY_KEYS and value != "auto"}
    resolved.pop("bfloat16", None)
    zero.pop("round_robin_gradients", None)
    resolved |= {
        **batch_keys(sizes),
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {**resolved.get("bf16", {}), "enabled": precision == "bf16"},
        "fp16": {**resolved.get("fp16", {}), "enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
    }
    # Summed in bf16, gradients lose more than in the passes (errors: docs/ZERO.md). DeepSpeed cannot at stage 0.
    if precision == "bf16" and sizes.accumulation > 1 and zero.get("stage", 0) > 0:
        resolved["data_types"] = {"grad_accum_dtype": "fp32", **resolved.get("data_types", {})}
    return {"steps_per_print": 2**31 - 1} | resolved


def batch_keys(sizes: BatchSizes) -> dict[str, int]:
    """Batch sizes under DeepSpeed's keys."""
    return {
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
    }


def resolve_checkpointing(raw: dict[str, Any], config: RunConfig) -> ActivationCheckpointingConfig:
    """The checkpointing to train with: the run YAML's, else what the ds JSON's `activation_checkpointing` block means.

    DeepSpeed itself ignores such a block: it configures its own checkpoint function, which a model has to call.
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


_ZERO_ALIASES = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}


def _as_deepspeed_reads(zero: Any) -> Any:
    """With "auto" resolved, keys under the names that stand in most files, and text read as the value it stands for."""
    if not isinstance(zero, dict):
        return zero
    sized = {key: _AUTO_VALUES.get(key, value) if value == "auto" else value for key, value in zero.items()}
    named = {_ZERO_ALIASES.get(key, key): value for key, value in without_auto(sized).items() if value is not None}
    return {key: _of_text(value) if isinstance(value, str) else value for key, value in named.items()}


def _with_buckets(zero: Any) -> Any:
    """With the buckets that the stage has and the file does not name."""
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (1, 2, 3):
        return zero
    unused = "allgather_bucket_size" if zero["stage"] == 3 else "stage3_prefetch_bucket_size"
    return {key: value for key, value in SMALL_BUCKETS.items() if key != unused} | zero


def ignored_note(raw: dict[str, Any], file: str) -> str | None:
    """One line about what in a DeepSpeed file has no effect here, and why; None if there is nothing."""
    given = dict(leaves(raw))
    found = [f"{key} (DeepSpeed has no such section)" for key in sorted(IGNORED_SECTIONS & raw.keys())]
    found += [
        f"{key} ({reason})" for key, reason in _IGNORED_KEYS.items() if given.get(key) not in (None, False, "auto")
    ]
    return f"of {file} {', '.join(found)}" if found else None


def _of_text(value: str) -> Any:
    try:
        read = json.loads(value.strip().lower())
    except ValueError:
        return value
    return int(read) if isinstance(read, float) and read.is_integer() else read


def _clashes(
    raw: dict[str, Any], config: RunConfig, sizes: BatchSizes, precision: Precision, run_file: str
) -> Iterator[str]:
    measured = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    owned = {
        **batch_keys(sizes),
        # Their numbers come later, so that none can stand here.
        **(dict.fromkeys(measured, "auto") if config.batch_size_training == "auto" else {}),
        "gradient_clipping": config.max_grad_norm,
        # Accumulation ends with the epoch, so the loop says in either mode which micro-batch is the last.
        "managed_gradient_accumulation": (True, False),
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
    for key, value in leaves(raw):
        section = key.split(".")[0]
        if key in _IGNORED_KEYS:
            continue
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


def _broken_combinations(zero: Any, raw: dict[str, Any], precision: Precision) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield f"zero_optimization: {zero!r} must be an object with a stage"
        return
    stage, fp16 = zero.get("stage", 0), precision == "fp16"
    offload, param = (_offload_device(zero, section) for section in ("offload_optimizer", "offload_param"))
    refused = {
        f"stage: {stage!r}: must be 0, 1, 2 or 3; see ds_configs/": stage not in (0, 1, 2, 3),
        "stage: 0 with fp16 trains on unscaled losses in DeepSpeed 0.19.8; use stage 1 or fp32": stage == 0 and fp16,
        "offload_optimizer: DeepSpeed ignores it at stage 0; use stage 1 or 2": stage == 0 and offload != "none",
        "offload_param: DeepSpeed ignores it below stage 3; use stage 3 or remove it": stage != 3 and param != "none",
        "offload_optimizer.device: nvme is not supported; use cpu": offload == "nvme",
        "offload_param.device: nvme is not supported; use cpu": param == "nvme",
        **{f"{old}: is deprecated in DeepSpeed; {new}": old in zero for old, new in _REPLACED.items()},
        "overlap_comm: true was never tried at stage 1, which sends nothing before its last backward; set it to "
        "false": stage == 1 and zero.get("overlap_comm"),
    }
    yield from (f"zero_optimization.{problem}" for problem, is_so in refused.items() if is_so)
    sums_in_fp32 = dict(leaves(raw)).get("data_types.grad_accum_dtype") in FP32_NAMES
    if offload != "none" and fp16 and sums_in_fp32:
        yield (
            "data_types.grad_accum_dtype: fp32 with fp16 and an offloaded optimizer never recovers from an overflow in "
            "DeepSpeed 0.19.8; remove it"
        )
