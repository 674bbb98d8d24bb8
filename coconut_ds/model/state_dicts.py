"""State dicts saved by other tools: prefixes of wrappers, completeness, quantized and non-finite weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from coconut_ds.errors import ModelError

PLAIN_NAMES = {
    # DataParallel, published Coconut, torch.compile, FSDP
    r"^(?:(?:module|base_causallm|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": "",
    # These three also occur inside a name.
    r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)": "",
}
"""Prefix patterns and their replacements, in the format of `key_mapping` of transformers' `from_pretrained`."""

_STORED_BY_OLDER_VERSIONS = re.compile(r"\.(?:attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved and newer ones compute."""
_NAMED = 3
SECOND_TABLE = "embedding.weight"
"""The name under which published Coconut stores its embedding table once more."""
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def plain_name(key: str) -> str:
    """`key` without the prefixes of wrappers."""
    for pattern, replacement in PLAIN_NAMES.items():
        key = re.sub(pattern, replacement, key)
    return key


def demand_whole(
    source: str,
    model: PreTrainedModel,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshaped: Mapping[str, str],
) -> None:
    """Raise ModelError naming missing, unexpected and misshaped weights of `source` for `model`.

    `misshaped`: name -> the shape found and the shape of the model.
    """
    found = {
        "missing": missing,
        "unexpected": [key for key in unexpected if not _STORED_BY_OLDER_VERSIONS.search(key)],
        "of another shape": list(misshaped),
    }
    parts = [f"{what} {_few(keys)}" for what, keys in found.items() if keys]
    if parts:
        first = next((f" ({how})" for how in misshaped.values()), "")
        raise ModelError(
            f"{source} does not fit {model.config.model_type}: {', '.join(parts)}{first}; a missing weight would be "
            "random: copy or export the model again, or set model_id to the model it was trained from"
        )


def demand_plain_tensors(folder: Path, model: PreTrainedModel) -> None:
    """Check the headers of the safetensors files that `model` was loaded from.

    Raises ModelError for names that are equal without the prefixes of wrappers, of which one would win, and for
    quantized weights (integers or 8 bits), which are meaningless without their scales.
    """
    names: list[str] = []
    odd: list[str] = []
    known = {name for name, _ in model.named_parameters()}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                plain, kind = plain_name(name), weights.get_slice(name).get_dtype()
                names.append(plain)
                if kind not in _PLAIN_TYPES and {plain, f"{model.base_model_prefix}.{plain}"} & known:
                    odd.append(f"{name} ({kind})")
    if len(set(names)) < len(names):
        raise ModelError(f"{folder} has weights twice, with and without prefixes; save one of them")
    if odd:
        raise ModelError(f"{folder} holds quantized weights: {_few(odd)}; save it in fp32, bf16 or fp16")


def _weight_files(folder: Path) -> list[Path]:
    """The existing safetensors files of a folder; transformers reports a missing shard."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if single.is_file():
            return [single]
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
        return [folder / name for name in sorted(shards) if (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary float tensor: not quantized, not sparse, not on the meta device."""
    return value.dtype in _PLAIN_DTYPES and value.layout == torch.strided and not value.is_meta


def demand_finite(source: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError naming the weights that hold NaN or an infinity."""
    broken = [name for name, value in weights.items() if value.numel() and not value.abs().amax().isfinite()]
    if broken:
        raise ModelError(f"{source} holds values that are not finite: {_few(broken)}; take an earlier checkpoint")


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{list(names[:_NAMED])}{rest}"
