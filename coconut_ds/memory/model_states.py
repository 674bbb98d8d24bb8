"""Pure: what ZeRO keeps between steps, from a resolved DeepSpeed configuration.

The arithmetic of Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.1, with the buffers DeepSpeed 0.19.8 adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coconut_ds.config.deepspeed_config import DEFAULT_BUCKETS, SMALL_BUCKETS

_FP32 = 4
_MOMENTS = 2 * _FP32
_GIB = 2**30


@dataclass(frozen=True)
class ModelStates:
    """Bytes per rank; `device` is the GPU, or host memory like everything else on a CPU."""

    device: int
    host: int


def model_states(ds_config: dict[str, Any], n_parameters: int, largest_parameter: int, world: int) -> ModelStates:
    """Weights, gradients, fp32 masters, Adam's moments and ZeRO's buffers of one rank.

    `largest_parameter` in elements: with offload its gradient passes through a buffer of its size.
    """
    zero = ds_config["zero_optimization"]
    stage = zero.get("stage", 0)
    width = _width(ds_config)
    weights, gradients = n_parameters * width, n_parameters * width
    if stage == 0:
        masters = n_parameters * _FP32 if width == 2 else 0
        return ModelStates(weights + gradients + masters + n_parameters * _MOMENTS, 0)
    share = -(-n_parameters // world)
    buckets = sum(bucket_bytes(ds_config).values())
    if stage >= 2:
        gradients = share * width
    resident, on_host = weights, 0
    if stage == 3:
        # In a multi-pass backward weights are released late: as many are gathered as the file allows.
        live = min(n_parameters, zero.get("stage3_max_live_parameters", 1_000_000_000)) * width
        is_resident = (zero.get("offload_param") or {}).get("device", "none") == "none"
        resident, on_host = live + (share * width if is_resident else 0), 0 if is_resident else share * width
    optimizer = share * (_FP32 + _MOMENTS)
    if (zero.get("offload_optimizer") or {}).get("device", "none") == "none":
        return ModelStates(resident + gradients + optimizer + buckets, on_host)
    passing = largest_parameter * width + (0 if stage >= 2 else gradients)
    return ModelStates(resident + buckets + passing, on_host + optimizer + share * _FP32)


def _width(ds_config: dict[str, Any]) -> int:
    return 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else _FP32


def bucket_bytes(ds_config: dict[str, Any], sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Bytes of ZeRO's buckets by their key, as far as they are buffers: allgather_bucket_size only cuts what is sent.

    `sizes`: number of elements per key, instead of the file's.
    """
    zero = ds_config["zero_optimization"]
    elements = sizes or DEFAULT_BUCKETS | {key: zero[key] for key in DEFAULT_BUCKETS if key in zero}
    stage, width = zero.get("stage", 0), _width(ds_config)
    found = {}
    if stage >= 1:
        found["reduce_bucket_size"] = elements["reduce_bucket_size"] * width * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        found["stage3_prefetch_bucket_size"] = elements["stage3_prefetch_bucket_size"] * width
    return found


def bucket_note(ds_config: dict[str, Any], file: str) -> str | None:
    """Why ZeRO's buckets take the memory they take, and what to write; None where they are small and named.

    Buckets are named where the `file` has none, so that DeepSpeed's defaults apply, and where one is above 1 GiB.
    """
    zero, small = ds_config["zero_optimization"], bucket_bytes(ds_config, SMALL_BUCKETS)
    clauses, write = [], []
    for key, n_bytes in bucket_bytes(ds_config).items():
        is_default = key not in zero
        if not is_default and n_bytes <= _GIB:
            continue
        what = f"no {key}, so DeepSpeed's default of {DEFAULT_BUCKETS[key]:,} elements takes"
        if not is_default:
            what = f"{key} {int(zero[key]):,}, which takes"
        clauses.append(f"has {what} {n_bytes / _GIB:.2f} GiB")
        write.append(f'"{key}": "auto" ({SMALL_BUCKETS[key]:,} elements, {small[key] / _GIB:.2f} GiB)')
    if not clauses:
        return None
    return f"{file} {', and '.join(clauses)}; write {' and '.join(write)} in zero_optimization"
