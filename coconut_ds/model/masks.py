"""The attention mask of all passes, made once per batch.

Otherwise the backbone makes one from the padding mask in every pass and checks whether there is any padding, which on a
GPU is one synchronisation per thought.

Shapes: B rows, T columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from coconut_ds.model.internals import attention_of


def causal_mask(attention_mask: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """(B, T) padding mask -> (B, 1, T, T), True where a query column (third) may attend to a key column (fourth).

    Padding attends to itself, so that no softmax is empty. Backbones that need another mask, such as a sliding window
    or the floats of eager attention, get their padding mask back and make their own.
    """
    # Multimodal models have separate settings for their text part.
    config = config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None or layer_types != {"full_attention"}
    # The name of the speed layer's attention also starts with "sdpa".
    if not attention_of(config).startswith("sdpa") or windowed:
        return attention_mask
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    queries, keys = columns[:, None], columns[None, :]
    return ((queries >= keys) & attention_mask.bool()[:, None, None, :]) | (queries == keys)


def columns_of(mask: torch.Tensor, start: int, end: int, keys: int) -> torch.Tensor:
    """The part of a mask of `causal_mask` for a pass over the columns `start` to `end` with `keys` keys.

    Keys beyond `end` are free space in a cache of fixed size.
    """
    if mask.ndim == 2:
        return mask[:, :end]
    part = mask[:, :, start:end, :end]
    return F.pad(part, (0, keys - end)) if keys > end else part
