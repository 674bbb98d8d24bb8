"""Batched decoding from the cached thoughts, by `generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from coconut_ds.model.passes import Encoded, Intervention, LatentPasses


@dataclass(frozen=True)
class Decoded:
    """The answers to a batch of prompts, and the passes before them."""

    tokens: torch.Tensor
    """(B, max_new_tokens), EOS after EOS."""
    encoded: Encoded | None
    """All columns of the prompts except the last, T - 1; None for prompts of one column."""


@torch.no_grad()
def decode(
    model: LatentPasses,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    thought_span: Sequence[int] | None = None,
    intervene: Intervention | None = None,
    **sampling: Any,
) -> Decoded:
    """Continue prompts (B, T), which are left-padded and end in an ordinary token; greedy by default.

    All columns except the last run once to fill the KV cache, thoughts included, and `generate` of the backbone
    continues from there. `sampling`: its arguments do_sample, temperature, top_k, top_p, streamer. Raises ValueError
    if a prompt ends in a thought or in padding.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    ends_badly = (input_ids[:, -1] == model.latent_token_id) | (attention_mask[:, -1] == 0)
    if ends_badly.any():
        rows = ends_badly.nonzero().flatten().tolist()
        raise ValueError(
            f"prompts {rows} end in a thought or in padding; pad on the left and end with an ordinary token, "
            "such as <|end-latent|>"
        )
    cache = encoded = None
    if input_ids.shape[1] > 1:
        cache = _cache(model, input_ids.shape[1] + max_new_tokens)
        # The last column is never a thought, so the span of the whole prompt is that of its head.
        head = slice(None, -1)
        encoded = model.encode(input_ids[:, head], attention_mask[:, head], None, thought_span, cache, intervene)
    tokens = _generate(model, input_ids, attention_mask, cache, max_new_tokens, **{"do_sample": False, **sampling})
    new_tokens = tokens[:, input_ids.shape[1] :]
    padded = F.pad(new_tokens, (0, max_new_tokens - new_tokens.shape[1]), value=model.eos_token_id)
    return Decoded(padded, encoded)


@torch.no_grad()
def next_token_logits(model: LatentPasses, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits (B, 1, V) from which `decode` chooses the first new token of prompts (B, T) without thoughts."""
    cache = _cache(model, input_ids.shape[1] + 1)
    model.encode(input_ids[:, :-1], attention_mask[:, :-1], None, (), cache)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return _generate(model, input_ids, attention_mask, cache, 1, **options).logits[0][:, None]


def _cache(model: LatentPasses, n_columns: int) -> Cache:
    """Of fixed size if the model supports it: a growing one is copied whole for every token."""
    config = model.base_causallm.config
    is_static = model.decodes_on_static_cache
    return StaticCache(config, max_cache_len=n_columns) if is_static else DynamicCache(config=config)


def _generate(
    model: LatentPasses,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache | None,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Any:
    backbone: Any = model.base_causallm
    wanted = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=True,
        disable_compile=True,
        eos_token_id=model.eos_token_id,
        pad_token_id=model.eos_token_id,
        **options,
    )
    # transformers takes unset options from the model's own configuration, such as the repetition penalty of a chat
    # model, with which "greedy" would not be greedy.
    own, backbone.generation_config = backbone.generation_config, GenerationConfig()
    try:
        return backbone.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            generation_config=wanted,
            streamer=streamer,
        )
    finally:
        backbone.generation_config = own
