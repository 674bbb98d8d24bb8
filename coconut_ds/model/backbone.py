"""The transformers model and tokenizer under Coconut: marker tokens, position limits, requirements of a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut_ds.data.markers import MARKERS, marker_ids
from coconut_ds.errors import ModelError

_MARKERS_START_FROM = "<<"

_POSITION_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_PROCESSED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Backbone:
    """A causal language model in fp32 and its tokenizer, which has an EOS and a padding token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def n_positions(self) -> int:
        """Maximum sequence length of the model, in tokens."""
        return n_positions(self.model)

    def marker_ids(self) -> dict[str, int]:
        """Ids of the marker tokens; raises ModelError when they were not added."""
        return marker_ids(self.tokenizer)


def add_markers(backbone: Backbone) -> None:
    """Add missing marker tokens; their embeddings start as that of `<<`, if the vocabulary has it, or the mean row."""
    model, tokenizer = backbone.model, backbone.tokenizer
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocabulary]
    if not missing:
        return
    source = vocabulary.get(_MARKERS_START_FROM)
    n_before = len(tokenizer)
    tokenizer.add_tokens(missing)
    embeddings: Any = model.get_input_embeddings()
    if embeddings.num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [tokenizer.get_vocab()[marker] for marker in missing]
    tables: list[Any] = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not tables[0]:
        tables.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for weight in tables:
            weight[new] = weight[source].clone() if source is not None else weight[:n_before].mean(dim=0)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point parameters of a model in place, as DeepSpeed does in half precision, and no buffers.

    `nn.Module.to` would also cast the frequencies of rotary embeddings, which are wrong by tenths of a radian in half.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def n_positions(model: PreTrainedModel) -> int:
    """Maximum sequence length of a model in tokens; `sys.maxsize` for a family without a limit (ALiBi, Bloom)."""
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _POSITION_LIMITS)
    limit = next((int(limit) for limit in limits if limit and limit > 0), sys.maxsize)  # XLNet says -1
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Longer sequences use other rotary factors for all positions, also for keys that are in the cache already.
        return min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def demand_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError if the tokenizer has ids beyond the rows of the embedding."""
    embeddings: Any = model.get_input_embeddings()
    n_rows, highest = len(embeddings.weight), max(tokenizer.get_vocab().values())
    if highest >= n_rows:
        raise ModelError(
            f"{name}: the tokenizer's highest id is {highest}, the embedding has {n_rows} rows; they are not of one "
            "model, or it was saved before tokens were added: call resize_token_embeddings and save it again"
        )


def demand_plain_head(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for a model whose logits are not a separate LM head applied to the states of its base model."""
    config = model.config.get_text_config(decoder=True)
    for key in _PROCESSED_LOGITS:
        if getattr(config, key, None) not in (None, 1.0):
            raise ModelError(f"{name} changes its logits after the LM head ({key}); not supported")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ModelError(f"{name} has no separate LM head; not supported")
