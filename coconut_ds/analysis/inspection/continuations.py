"""Probabilities of given texts after prompts with thoughts and after prefixes of them, with one pass per prompt.

Shapes: B prompts of T columns, R continuations of at most L tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from coconut_ds.model.coconut import Coconut
from coconut_ds.model.masks import causal_mask, columns_of


class Continuation(NamedTuple):
    """Tokens after the prompt in `row` without its last `n_dropped` columns."""

    row: int
    n_dropped: int
    tokens: tuple[int, ...]

    @property
    def head(self) -> Continuation:
        """All but the last token."""
        return self._replace(tokens=self.tokens[:-1])

    def begins(self, other: Continuation) -> bool:
        """Whether the other one starts with this one, or is the same."""
        return self[:2] == other[:2] and self.tokens == other.tokens[: len(self.tokens)]


@torch.no_grad()
def token_log_probs(
    model: Coconut,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    continuations: Iterable[Continuation],
    rows_at_once: int,
) -> dict[Continuation, list[float]]:
    """Log probabilities (natural) of the tokens of each continuation after the first, which is given.

    The prompts (B, T) are left-padded. They are run once whatever is dropped, because the keys and values of a column
    do not depend on later columns. `rows_at_once` limits R. Continuations have at least two tokens.
    """
    wanted = list(continuations)
    # DynamicLayer keeps every column, also for models whose caches keep only a sliding window.
    cache = Cache(layers=[DynamicLayer() for _ in range(model.base_causallm.config.num_hidden_layers)])
    model.encode(input_ids, attention_mask, cache=cache)
    longest = _longest_heads(each.head for each in wanted)
    by_head: dict[Continuation, list[Continuation]] = defaultdict(list)
    for each in wanted:
        by_head[longest[each.head]].append(each)
    found: dict[Continuation, list[float]] = {}
    heads = list(by_head)
    for start in range(0, len(heads), rows_at_once):
        chunk = heads[start : start + rows_at_once]
        states = _states_after(model, cache, attention_mask, chunk)
        for head, row in zip(chunk, states):
            # In fp64, because sums of many probabilities are subtracted from 1.
            log_probs = model.lm_head(row[: len(head.tokens)]).double().log_softmax(dim=-1)  # (L, V)
            mine = by_head[head]
            places = [place for each in mine for place in range(len(each.tokens) - 1)]
            tokens = [token for each in mine for token in each.tokens[1:]]
            # One transfer for the head: each synchronises with a GPU.
            values = iter(log_probs[places, tokens].tolist())
            found.update((each, list(itertools.islice(values, len(each.tokens) - 1))) for each in mine)
    return found


def _longest_heads(heads: Iterable[Continuation]) -> dict[Continuation, Continuation]:
    """For each head the longest one that starts with it, whose states include its states."""
    found: dict[Continuation, Continuation] = {}
    following = None
    # In sorted order a head is next to one that starts with it.
    for head in sorted(set(heads), reverse=True):
        found[head] = found[following] if following is not None and head.begins(following) else head
        following = head
    return found


def _states_after(
    model: Coconut, cache: Cache, attention_mask: torch.Tensor, heads: Sequence[Continuation]
) -> torch.Tensor:
    """Hidden states (R, L, D) of the heads' tokens, each after its prompt in `cache`, which is not changed."""
    device = attention_mask.device
    rows = torch.tensor([each.row for each in heads], device=device)[:, None]
    dropped = torch.tensor([each.n_dropped for each in heads], device=device)[:, None]
    length = max(len(each.tokens) for each in heads)
    # Shorter heads are padded on the right, where none of their tokens attends.
    ids = torch.tensor(
        [[*each.tokens, *each.tokens[:1] * (length - len(each.tokens))] for each in heads], device=device
    )
    # The columns kept of a prompt move to the right, next to the continuation.
    n_columns = attention_mask.shape[1]
    columns = torch.arange(n_columns, device=device) - dropped  # (R, T)
    is_there = columns >= 0
    columns = columns.clamp_min(0)
    layers: Any = cache.layers
    moved = DynamicCache(
        [tuple(kept[rows, :, columns].transpose(1, 2) for kept in (layer.keys, layer.values)) for layer in layers]
    )
    before = attention_mask[rows, columns] * is_there  # (R, T)
    padding = torch.cat([before, torch.ones_like(ids)], dim=1)
    mask = causal_mask(padding, model.base_causallm.config, layers[0].keys.dtype)
    return model.base_causallm.base_model(
        input_ids=ids,
        attention_mask=columns_of(mask, n_columns, n_columns + length, 0),
        position_ids=before.sum(dim=1, keepdim=True) + torch.arange(length, device=device),
        past_key_values=moved,
        use_cache=True,
    ).last_hidden_state


def exclusive_probabilities(log_probs: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Probability that a text starts with each sequence of tokens and with none of the longer ones.

    `log_probs` are those of starting with it, longer ones included: "n1" may continue to "n12". The events exclude each
    other, so their probabilities sum to 1 at most.
    """
    exclusive = {tokens: math.exp(value) for tokens, value in log_probs.items()}
    for tokens, value in log_probs.items():
        shorter = (tokens[:end] for end in range(len(tokens) - 1, 0, -1))
        nearest = next((start for start in shorter if start in log_probs), None)
        if nearest is not None:
            exclusive[nearest] -= math.exp(value)
    # Rounding may give a value slightly below 0 if a sequence always continues to a longer one.
    return {tokens: max(0.0, value) for tokens, value in exclusive.items()}
