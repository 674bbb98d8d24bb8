"""Inspection of a batch's thoughts: the averaged states, the embeddings fed, and the LM head's reading of them.

Shapes: B rows, T columns, K thoughts of the row with the most, J states in the window, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from coconut_ds.model.latents import next_thought, states_in_reach, window_shares
from coconut_ds.model.passes import Encoded, LatentPasses


@dataclass(frozen=True)
class Thoughts:
    """The thoughts of each row in order; entries beyond a row's count are meaningless."""

    counts: torch.Tensor
    """(B,) thoughts of each row."""
    fed: torch.Tensor
    """(B, K, D) the embeddings fed at the thought columns."""
    averages: torch.Tensor
    """(B, K, D) the windows' averages, before projection, norm and interventions; without these, equal to `fed`."""
    shares: torch.Tensor
    """(B, K, J) the weight of each state of the window, newest first; zeros if a row has fewer states."""


@torch.no_grad()
def read_thoughts(
    model: LatentPasses, encoded: Encoded, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> Thoughts:
    """The thoughts in `encoded`, which may lack final columns of the (B, T) inputs if they hold no thought."""
    context, first_real = model.latent_context, attention_mask.argmax(dim=1)
    is_thought = torch.eq(input_ids, -1 if model.latent_token_id is None else model.latent_token_id)
    counts = is_thought.sum(dim=1)
    # Columns of the row's thoughts come first, in order; column 0 is never one.
    columns = is_thought.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())].clamp_min(1)
    columns = columns.clamp_max(encoded.hidden.shape[1] - 1)  # (B, K)
    fed = _rows_at(encoded.inputs_embeds, columns)
    back = torch.arange(1, context.reach + 1, device=columns.device)  # (J,)
    before = (columns[..., None] - back).clamp_min(0)  # (B, K, J)
    before = before.clamp_max(encoded.sources.shape[1] - 1)  # of entries beyond a row's count
    states = _rows_at(encoded.sources, before.flatten(1)).view(*before.shape, encoded.sources.shape[2])  # (B, K, J, D)
    follows = is_thought.gather(1, columns - 1)
    in_reach = [
        states_in_reach(context.scope, column, first_real, after) for column, after in zip(columns.T, follows.T)
    ]
    available = torch.stack(in_reach, dim=1).flatten() if in_reach else counts.new_zeros(0)  # (B * K,)
    weights = torch.tensor(model.latent_window.current(), device=columns.device)
    averages = next_thought(states.flatten(0, 1), available, weights)
    shares = window_shares(available, weights)
    return Thoughts(counts, fed, averages.view_as(fed), shares.view(*before.shape))


def _rows_at(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """values (B, T, D) at columns (B, N) of each row: (B, N, D)."""
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[2]))


Readings = list[list[tuple[str, float]]]
"""For each thought of a row its most probable tokens, with their probabilities."""


@torch.no_grad()
def vocabulary_reading(model: LatentPasses, averages: torch.Tensor) -> torch.Tensor:
    """The LM head's probabilities (..., V), fp32, for averages (..., D).

    For a thought that averages one state, this is the distribution of the token that would be generated in its place.
    """
    return model.lm_head(averages).float().softmax(dim=-1)


def top_tokens(
    model: LatentPasses, thoughts: Thoughts, tokenizer: PreTrainedTokenizerBase, top_k: int = 3
) -> list[Readings]:
    """The readings of every row, most probable tokens first, as text."""
    readings: list[Readings] = [[] for _ in thoughts.counts]
    # One thought at a time: the probabilities of all would take K times the memory.
    for number, averages in enumerate(thoughts.averages.unbind(dim=1)):
        values, ids = (each.tolist() for each in vocabulary_reading(model, averages).topk(top_k, dim=-1))
        texts = {token: str(tokenizer.decode([token])) for token in {token for row in ids for token in row}}
        for row, count in enumerate(thoughts.counts.tolist()):
            if number < count:
                readings[row].append([(texts[token], value) for token, value in zip(ids[row], values[row])])
    return readings
