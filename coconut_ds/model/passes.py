"""The passes of Coconut: how thoughts are computed and fed, on any KV cache.

Shapes: B rows, T columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from coconut_ds.model.internals import demand_names, takes_static_cache
from coconut_ds.model.latents import LatentContext, LatentWindow, next_thought, scaled, states_in_reach, wanted_norm
from coconut_ds.model.masks import causal_mask, columns_of

TOKEN_IDS = ("latent_token_id", "start_latent_id", "end_latent_id", "eos_token_id")
"""Attributes and arguments of `LatentPasses` that are token ids."""

Intervention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(number (B,), thought (B, D)) -> (B, D): the embedding to feed instead of each row's `number`-th thought, from 0.

`number` is -1 in a row whose column holds an ordinary token, which is not replaced.
"""


@dataclass(frozen=True)
class Encoded:
    """Result of all passes: hidden states after the final norm, and the embeddings that were fed."""

    hidden: torch.Tensor
    """(B, T, D)"""
    fed: Sequence[torch.Tensor]
    """The embeddings fed to each pass, (B, columns, D) each."""

    @property
    def inputs_embeds(self) -> torch.Tensor:
        """(B, T, D), thoughts filled in."""
        return torch.cat(tuple(self.fed), dim=1)


class SpeedLayer(Protocol):
    """The interface of `model/fast` to the passes of a forward; without it they run on plain transformers."""

    def cache(self, n_columns: int) -> Cache:
        """An empty KV cache for the passes of a training forward over `n_columns` columns."""

    def forward(self) -> Callable[[bool], AbstractContextManager[None]]:
        """Called once per forward: makes the context of each pass, given whether the pass is the prefix."""

    def checkpoint_layers(self, every_n_layers: int, offload: bool) -> None: ...

    def restore_layers(self) -> None: ...


class LatentPasses(nn.Module):
    """A causal language model whose `<|latent|>` positions are fed earlier hidden states instead of embeddings.

    The prefix (columns before the first thought of the batch) runs once, then one column per thought on the KV cache;
    the last thought column runs together with the tail. Chain of Continuous Thought, arXiv 2412.06769, section 3.
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        *,
        latent_token_id: int | None,
        start_latent_id: int | None,
        end_latent_id: int | None,
        eos_token_id: int,
        latent_context: LatentContext | None = None,
    ):
        super().__init__()
        demand_names(base_causallm)
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.latent_context = latent_context or LatentContext()
        self.latent_window = LatentWindow(self.latent_context)
        self.training_settings: dict[str, Any] = {}
        """The contents of `coconut.json` about the run that trained the weights; saved with them."""
        self.step_decoder: PreTrainedModel | None = None
        """Writes steps from thoughts in training, if a decoder of its own does (`step_decoder.py`)."""
        self.speed_layer: SpeedLayer | None = None
        """Set by `fast.install`."""
        self.decodes_on_static_cache = takes_static_cache(base_causallm)
        """Otherwise answers are decoded on a growing cache."""
        self._demand_fit()

    def _demand_fit(self) -> None:
        """Raise ModelError for a backbone that these passes do not fit; implemented by the subclass."""

    @property
    def lm_head(self) -> nn.Module:
        return self.base_causallm.get_output_embeddings()

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        thought_span: Sequence[int] | None = None,
        cache: Cache | None = None,
        intervene: Intervention | None = None,
    ) -> Encoded:
        """Run all passes over (B, T) inputs. A given `cache` must be empty, and holds every column afterwards.

        `intervene` is called with every thought before it is fed and returns the embedding to feed instead.
        """
        if self.training and self.base_causallm.is_activation_checkpointing:
            raise ValueError(
                "the model's own gradient checkpointing drops the KV cache and with it every thought; call "
                "activation_checkpointing_disable() on it and enable_activation_checkpointing() on the Coconut model"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        span = self._find_thoughts(input_ids) if thought_span is None else tuple(thought_span)
        embeds = self.base_causallm.get_input_embeddings()(input_ids)  # (B, T, D)
        # -1 for a growing cache.
        keys = cache.get_max_length() if cache is not None and cache.layers else 0
        layer = self.speed_layer
        if cache is None and span:
            cache = layer.cache(input_ids.shape[1]) if layer else DynamicCache(config=self.base_causallm.config)
        mask = causal_mask(attention_mask, self.base_causallm.config, embeds.dtype, keys)
        # Also without thoughts: gradients must become ready in one order on every rank (`fast/__init__.py`).
        around = layer.forward() if layer else nullcontext

        def run(embeds: torch.Tensor, start: int) -> torch.Tensor:
            """One pass of the backbone without its LM head over the columns from `start` on: (B, columns, D)."""
            end = start + embeds.shape[1]
            with around(start == 0):
                return self.base_causallm.base_model(
                    inputs_embeds=embeds,
                    attention_mask=columns_of(mask, start, end, keys),
                    position_ids=position_ids[:, start:end],
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).last_hidden_state

        if span:
            passes = list(self._passes(span, input_ids, embeds, attention_mask, run, intervene))
        else:
            _, hidden = self.latent_window(run(embeds, 0))
            passes = [(embeds, hidden)]
        fed, states = zip(*passes)
        return Encoded(torch.cat(states, dim=1), fed)

    def _passes(
        self,
        span: tuple[int, ...],
        input_ids: torch.Tensor,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        run: Callable[[torch.Tensor, int], torch.Tensor],
        intervene: Intervention | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (embeddings fed, hidden states), each (B, columns, D), of the prefix, each thought, and the tail."""
        first, end = span
        if self.latent_token_id is None:
            raise ValueError(f"thought_span {span}: this model was built without latent_token_id")
        if first == 0:
            raise ValueError("a thought stands in column 0, where no hidden state precedes it; put a token before it")
        context = self.latent_context
        is_thought = torch.eq(input_ids, self.latent_token_id)  # (B, T)
        first_real = attention_mask.argmax(dim=1)  # (B,)
        norm = wanted_norm(context, embeds, attention_mask, is_thought)
        fed = embeds[:, :first]
        weights, hidden = self.latent_window(run(fed, 0))
        yield fed, hidden
        recent = hidden[:, -context.reach :].flip(1)  # (B, J, D), newest first
        for column in range(first, end):
            available = states_in_reach(context.scope, column, first_real, is_thought[:, column - 1])
            thought = scaled(next_thought(recent, available, weights), norm)  # (B, D)
            if intervene is not None:
                number = torch.where(is_thought[:, column], is_thought[:, :column].sum(dim=1), -1)
                thought = intervene(number, thought)
            # In another row this column can be an ordinary token.
            fed = torch.where(is_thought[:, column, None], thought, embeds[:, column])[:, None]
            if column == end - 1:
                fed = torch.cat([fed, embeds[:, end:]], dim=1)
            hidden = run(fed, column)
            yield fed, hidden
            recent = torch.cat([hidden[:, :1], recent], dim=1)[:, : context.reach]

    def _find_thoughts(self, input_ids: torch.Tensor) -> tuple[int, ...]:
        if self.latent_token_id is None:
            return ()
        columns = (input_ids == self.latent_token_id).any(dim=0).nonzero()
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else ()
