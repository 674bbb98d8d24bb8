"""Memory that ZeRO keeps between steps, computed from a resolved DeepSpeed configuration.

The formulas of Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.1, and the buffers that DeepSpeed 0.19.8 adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from coconut_ds.config.deepspeed_config import FP32_NAMES, SMALL_BUCKETS

_FP32 = 4
_MOMENTS = 2 * _FP32
_GIB = 2**30


class Elements(NamedTuple):
    """Of a model's parameters."""

    trained: list[int]
    frozen: int

    @classmethod
    def of(cls, model: nn.Module) -> Elements:
        parameters = list(model.parameters())
        trained = [each.numel() for each in parameters if each.requires_grad]
        return cls(trained, sum(each.numel() for each in parameters) - sum(trained))

    def states(self, ds_config: dict[str, Any], world: int) -> ModelStates:
        return model_states(ds_config, sum(self.trained), max(self.trained), world, self.frozen)


@dataclass(frozen=True)
class ModelStates:
    """Bytes per rank; without a GPU both are host memory."""

    device: int
    host: int


def model_states(
    ds_config: dict[str, Any], n_parameters: int, largest_parameter: int, world: int, n_frozen: int = 0
) -> ModelStates:
    """Weights, gradients, fp32 masters, Adam's moments and ZeRO's buffers of one rank.

    `largest_parameter` in elements: with offload, gradients pass through a buffer of that size. `n_frozen` elements
    beside the `n_parameters` trained ones are weights alone.
    """
    zero = ds_config["zero_optimization"]
    stage = zero.get("stage", 0)
    width = element_bytes(ds_config)
    sums_in_fp32 = width < _FP32 and ds_config.get("data_types", {}).get("grad_accum_dtype") in FP32_NAMES
    gradient_width = _FP32 if sums_in_fp32 else width
    weights, gradients = (n_parameters + n_frozen) * width, n_parameters * gradient_width
    if stage == 0:
        masters = n_parameters * _FP32 if width == 2 else 0
        return ModelStates(weights + gradients + masters + n_parameters * _MOMENTS, 0)
    share = -(-n_parameters // world)
    buckets = sum(bucket_bytes(ds_config).values())
    if stage >= 2:
        gradients = share * gradient_width
    resident, on_host = weights, 0
    if stage == 3:
        # A multi-pass backward releases weights late, so the number of gathered ones reaches the file's limit.
        live = min(n_parameters + n_frozen, zero.get("stage3_max_live_parameters", 1_000_000_000)) * width
        is_resident = (zero.get("offload_param") or {}).get("device", "none") == "none"
        of_weights = -(-(n_parameters + n_frozen) // world) * width
        resident, on_host = live + (of_weights if is_resident else 0), 0 if is_resident else of_weights
    optimizer = share * (_FP32 + _MOMENTS)
    if (zero.get("offload_optimizer") or {}).get("device", "none") == "none":
        return ModelStates(resident + gradients + optimizer + buckets, on_host)
    # Sums in another type than the weights' stay on the device at stage 2.
    stay = stage < 2 or (stage == 2 and sums_in_fp32)
    passing = largest_parameter * width + (gradients if stay else 0)
    return ModelStates(resident + buckets + passing, on_host + optimizer + share * _FP32)


def element_bytes(ds_config: dict[str, Any]) -> int:
    """Bytes of a weight as a run computes with it."""
    return 2 if ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"] else _FP32


def bucket_bytes(ds_config: dict[str, Any], sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Bytes of ZeRO's buckets by key, without allgather_bucket_size, which only splits messages and has no buffer.

    `sizes`: number of elements per key, instead of the file's.
    """
    zero = ds_config["zero_optimization"]
    elements = sizes or SMALL_BUCKETS | {key: zero[key] for key in SMALL_BUCKETS if key in zero}
    stage, width = zero.get("stage", 0), element_bytes(ds_config)
    found = {}
    if stage >= 1:
        found["reduce_bucket_size"] = elements["reduce_bucket_size"] * width * (2 if zero.get("overlap_comm") else 1)
    if stage == 3:
        found["stage3_prefetch_bucket_size"] = elements["stage3_prefetch_bucket_size"] * width
    return found


def bucket_note(ds_config: dict[str, Any], file: str) -> str | None:
    """Explains buckets of ZeRO above 1 GiB, and what to write instead; None if there are none."""
    zero, small = ds_config["zero_optimization"], bucket_bytes(ds_config, SMALL_BUCKETS)
    clauses, write = [], []
    for key, n_bytes in bucket_bytes(ds_config).items():
        if n_bytes <= _GIB:
            continue
        clauses.append(f"has {key} {int(zero[key]):,}, which takes {n_bytes / _GIB:.2f} GiB")
        write.append(f'"{key}": "auto" ({SMALL_BUCKETS[key]:,} elements, {small[key] / _GIB:.2f} GiB)')
    if not clauses:
        return None
    return f"{file} {', and '.join(clauses)}; write {' and '.join(write)} in zero_optimization"
