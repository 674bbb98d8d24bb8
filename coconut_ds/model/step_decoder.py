"""Step supervision: a decoder writes each replaced step from its thoughts alone (SIM-CoT, arXiv 2509.20317).

The decoder is the backbone itself, or a copy of it with weights of its own that training alone needs.

For the group of c thoughts t_1 .. t_c that stands for a step r of n tokens, the loss is

    - sum_i log p(r_i | t_1 .. t_c, r_1 .. r_{i-1}),   i = 1 .. n + 1 with r_{n+1} the end

where the t are the vectors fed to the model. A group sees neither the question nor other groups, and its positions
count from 0. All groups of a batch go through as one batch, without a cache.

Shapes: B rows, T columns, D hidden size; R groups, c thoughts each, L tokens of the longest text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from coconut_ds.data.step_targets import StepTargets
from coconut_ds.model.loss import summed_cross_entropy
from coconut_ds.model.masks import causal_mask
from coconut_ds.model.passes import LatentPasses

DECODER_FILE = "step_decoder.safetensors"
"""The weights of a copy, in the folder of a checkpoint."""
PREFIX = "step_decoder."
"""Of their names."""


def copy_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """A decoder with the weights of `backbone`, to be made before the speed layer is installed on it.

    It reads embeddings of the backbone's table, and keeps one of its own only as the weight of its LM head. Frozen
    weights are shared.
    """
    shared: dict[int, Any] = {id(each): each for each in backbone.parameters() if not each.requires_grad}
    decoder: PreTrainedModel = copy.deepcopy(backbone, shared)
    if decoder.get_output_embeddings().weight is not decoder.get_input_embeddings().weight:
        decoder.set_input_embeddings(nn.Identity())
    return decoder


@torch.no_grad()
def load_decoder(decoder: PreTrainedModel, checkpoint: Path) -> None:
    """Fill a copy with the weights stored in `checkpoint`, if it has any."""
    stored = stored_decoder(checkpoint)
    for name, parameter in decoder.named_parameters() if stored else ():
        if parameter.requires_grad:
            parameter.copy_(stored[PREFIX + name])


def write_decoder(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Store the weights of a copy, by their names in the run's model, if there are any."""
    if weights:
        save_file(weights, checkpoint / DECODER_FILE)


def stored_decoder(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a copy by their names in the run's model; empty if the checkpoint has none."""
    file = checkpoint / DECODER_FILE
    return load_file(file) if file.is_file() else {}


def written_steps_loss(model: LatentPasses, fed: torch.Tensor, steps: StepTargets) -> torch.Tensor:
    """Sum of the cross entropies of all supervised tokens of `steps`, given the embeddings `fed` (B, T, D); 0-d."""
    groups, per_step = steps.thoughts.shape
    thoughts = fed.flatten(0, 1).index_select(0, steps.thoughts.flatten()).unflatten(0, (groups, per_step))
    # The last token is predicted only; padding is embedded as token 0, and nothing real comes after it.
    hidden = _states(model, thoughts, steps.tokens[:, :-1].clamp_min(0))
    states = hidden.flatten(0, 1).index_select(0, steps.supervised)
    head = _decoder(model).get_output_embeddings()
    return summed_cross_entropy(head, states, steps.tokens.flatten().index_select(0, steps.supervised))


@torch.no_grad()
def write_steps(model: LatentPasses, thoughts: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The `n_tokens` most probable tokens after each group of thoughts (R, c, D), one after another; (R, n_tokens)."""
    tokens = torch.empty(len(thoughts), 0, dtype=torch.long, device=thoughts.device)
    for _ in range(n_tokens):
        logits = _decoder(model).get_output_embeddings()(_states(model, thoughts, tokens)[:, -1])
        tokens = torch.cat([tokens, logits.argmax(dim=1, keepdim=True)], dim=1)
    return tokens


def _decoder(model: LatentPasses) -> PreTrainedModel:
    return model.step_decoder or model.base_causallm


def _states(model: LatentPasses, thoughts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states (R, N + 1, D) that predict the token after each of `tokens` (R, N), and the first one."""
    decoder = _decoder(model)
    embeds = torch.cat([thoughts, model.base_causallm.get_input_embeddings()(tokens)], dim=1)  # (R, c + N, D)
    places = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    hidden = decoder.base_model(
        inputs_embeds=embeds,
        attention_mask=causal_mask(torch.ones_like(places), decoder.config, embeds.dtype),
        position_ids=places,
        use_cache=False,
    ).last_hidden_state
    # The first token is predicted from the last thought.
    return hidden[:, thoughts.shape[1] - 1 :]
