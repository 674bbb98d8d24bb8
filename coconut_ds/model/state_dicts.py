"""State dicts as they are saved elsewhere: the prefixes of wrappers, and whether all of a model is in one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from coconut_ds.errors import ModelError

PLAIN_NAMES = {
    # DataParallel, published Coconut, torch.compile, FSDP
    r"^(?:(?:module|base_causallm|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+": "",
    # The last three stand before any part of a name.
    r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)": "",
}
"""Patterns of wrappers and what replaces them, as `key_mapping` of transformers' `from_pretrained` takes them."""

_STORED_BY_OLDER_VERSIONS = re.compile(r"\.(?:attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved and newer ones work out."""
_NAMED = 3


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
    """Raise ModelError naming what `source` lacks of `model`, has beside it, and has in another shape or type.

    `misshaped` says for each name what there is and what the model has.
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


def demand_finite(source: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError naming the weights that hold NaN or an infinity."""
    broken = [name for name, value in weights.items() if value.numel() and not value.abs().amax().isfinite()]
    if broken:
        raise ModelError(f"{source} holds values that are not finite: {_few(broken)}; take an earlier checkpoint")


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{list(names[:_NAMED])}{rest}"
