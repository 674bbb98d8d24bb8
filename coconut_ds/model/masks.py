"""The attention mask of all passes, made once per batch.

Otherwise the backbone makes one from the padding mask in every pass and checks whether there is any padding, which on a
GPU is one synchronisation per thought. It is added to attention's scores: torch would make such a mask from a boolean
one in every layer of every pass, three operations each on a GPU.

Shapes: B rows, T columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from coconut_ds.model.internals import attention_of

_ALIGNED = 8
"""Elements at whose multiples a row of the mask has to start for memory-efficient attention on a GPU, which otherwise
copies it."""


def causal_mask(
    attention_mask: torch.Tensor, config: PreTrainedConfig, dtype: torch.dtype, keys: int = 0
) -> torch.Tensor:
    """(B, T) padding mask -> (B, 1, T, T), or (B, 1, T, keys) for a cache of more columns, free ones at its end.

    In the `dtype` of the model: 0 where a query column (third) may attend to a key column (fourth), otherwise -inf.
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
    n_rows, n_columns = attention_mask.shape
    keys = max(keys, n_columns)
    queries = torch.arange(n_columns, device=attention_mask.device)[:, None]
    columns = torch.arange(keys, device=attention_mask.device)
    is_real = F.pad(attention_mask.bool(), (0, keys - n_columns))[:, None, None, :]
    attends = ((queries >= columns) & is_real) | (queries == columns)  # (B, 1, T, keys)
    width = -(-keys // _ALIGNED) * _ALIGNED
    mask = torch.zeros(n_rows, 1, n_columns, width, dtype=dtype, device=attends.device)[..., :keys]
    return mask.masked_fill_(~attends, -torch.inf)


def columns_of(mask: torch.Tensor, start: int, end: int, keys: int) -> torch.Tensor:
    """The part of a mask of `causal_mask` for a pass over the columns `start` to `end` with `keys` keys.

    Keys beyond `end` are free space in a cache of fixed size.
    """
    if mask.ndim == 2:
        return mask[:, :end]
    return mask[:, :, start:end, : max(end, keys)]
