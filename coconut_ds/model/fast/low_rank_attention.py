"""Low-rank gradients of keys and values: attention of short passes keeps factors, the KV cache multiplies them once.

Per head the gradients are products of a few rows, (queries, P) and (queries, d), which torch's attention multiplies out
to all columns, (P, d), and autograd adds up pass by pass. torch's attention still runs the prefix, a tail of so many
queries that the factors would take more memory than their product, and what `low_rank.pays` excludes.

Shapes: B rows, N columns of the pass, H key-value heads with G query heads each, P columns so far, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coconut_ds.model.fast.kv_cache import collected
from coconut_ds.model.fast.low_rank import pays
from coconut_ds.model.fast.planning import plans_for_card
from coconut_ds.model.internals import attention_of

GATHERING_SDPA = "sdpa_gathering"
"""The name under which transformers knows this attention; it is not saved with a configuration."""


def install(model: PreTrainedModel) -> bool:
    """Replace torch's attention in a model by this one; returns False for a model with another attention."""
    is_sdpa = attention_of(model.config) == "sdpa"
    if is_sdpa:
        model.set_attn_implementation(GATHERING_SDPA)
    return is_sdpa


def uninstall(model: PreTrainedModel) -> None:
    """Undo an `install` that returned True."""
    model.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Query (B, H * G, N, d), keys and values (B, H, P, d) -> (B, N, H * G, d), the interface of transformers."""
    dropout = 0.0 if plans_for_card() else dropout
    of_keys, of_values = collected(key), collected(value)
    columns, size = query.shape[2:]
    has_plain_mask = columns == 1 if attention_mask is None else attention_mask.shape[1] == 1
    is_plain = has_plain_mask and options.get("position_bias") is None
    groups = query.shape[1] // key.shape[1]
    is_short = columns < key.shape[2] and columns * groups <= size
    if of_keys is None or of_values is None or not (is_short and is_plain and pays(query)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    query = query.reshape(len(key), key.shape[1], groups * columns, size)
    query = query * (size**-0.5 if scaling is None else scaling)
    scores = _Product.apply(query, key.mT, lambda rows, gradient: of_keys.keep(gradient, rows))
    if attention_mask is not None:
        mask = attention_mask.repeat(1, 1, groups, 1)  # (B, 1, G * N, P)
        # A boolean one is the model's own (sliding window): padding may attend to nothing, where -inf would give NaN.
        is_added = mask.dtype != torch.bool
        scores = scores + mask if is_added else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = F.dropout(F.softmax(scores, dim=-1), dropout)  # (B, H, G * N, P)
    mixed = _Product.apply(shares, value, of_values.keep)  # (B, H, G * N, d)
    return mixed.reshape(len(key), -1, columns, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(GATHERING_SDPA, _attention)
AttentionMaskInterface.register(GATHERING_SDPA, sdpa_mask)


class _Product(torch.autograd.Function):
    """(B, H, rows, K) times (B, H, K, O); passes the factors of the matrix's gradient to `keep`."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, matrix: torch.Tensor, keep: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, matrix)
        ctx.keep = keep
        return rows @ matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        ctx.keep(rows, gradient)
        return gradient @ matrix.mT, None, None
