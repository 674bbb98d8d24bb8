"""Chunked cross entropy of supervised positions: at most one chunk of logits is in memory.

Shapes: N supervised positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Positions per chunk of logits: 49 MiB in fp32 for the vocabulary of GPT-2."""


def summed_cross_entropy(lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of states (N, D) against targets (N,), softmax in fp32; 0-d, 0 for N = 0.

    More than `CHUNK` positions are split into chunks whose logits are recomputed in the backward. The head is called as
    a module: ZeRO-3 gathers its weight only for such a call.
    """
    if len(targets) <= CHUNK:
        return _chunk_loss(lm_head, states, targets)
    parts = [
        checkpoint(_chunk_loss, lm_head, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(states.split(CHUNK), targets.split(CHUNK))
    ]
    return torch.stack(parts).sum()


def _chunk_loss(lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")
