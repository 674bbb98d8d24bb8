"""The passes of Coconut: how thoughts are computed and fed, on any KV cache.

Shapes: B rows, T columns, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from coconut_ds.errors import ModelError
from coconut_ds.model.internals import demand_names, takes_static_cache
from coconut_ds.model.jacobi import Jacobi, JacobiPasses, Run, mask_of_iteration
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
    sources: torch.Tensor
    """The states that thoughts were made from: `hidden`, or (B, columns up to the last thought, D) of the iteration
    before the last one."""

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


class StateReader(Protocol):
    """Wants to see the states of all layers."""

    def read(self, start: int, hidden_states: Sequence[torch.Tensor]) -> None:
        """After each pass: its first column, and (B, columns, D) of the embeddings and of each layer."""


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
        solver: Jacobi | None = None,
    ):
        super().__init__()
        demand_names(base_causallm)
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.latent_context = latent_context or LatentContext()
        table: Any = base_causallm.get_input_embeddings()
        self.latent_window = LatentWindow(self.latent_context, table.embedding_dim)
        self.solver = solver
        """None computes one thought after another."""
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
        reader: StateReader | None = None,
    ) -> Encoded:
        """Run all passes over (B, T) inputs. A given `cache` must be empty, and holds every column afterwards.

        `intervene` is called with every thought before it is fed and returns the embedding to feed instead; `reader`
        gets the states of all layers after every pass.
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
        given, keys = cache, cache.get_max_length() if cache is not None and cache.layers else 0
        mask = causal_mask(attention_mask, self.base_causallm.config, embeds.dtype, keys)
        # Also without thoughts: gradients must become ready in one order on every rank (`fast/__init__.py`).
        around = self.speed_layer.forward() if self.speed_layer else nullcontext

        def run(embeds: torch.Tensor, start: int, cache: Cache | None, unseen: int = 0) -> torch.Tensor:
            """One pass of the backbone without its LM head over the columns from `start` on: (B, columns, D)."""
            end = start + embeds.shape[1]
            room = keys if cache is given else 0
            seen = mask_of_iteration(mask, start, end, unseen) if unseen else columns_of(mask, start, end, room)
            with around(start == 0):
                output = self.base_causallm.base_model(
                    inputs_embeds=embeds,
                    attention_mask=seen,
                    position_ids=position_ids[:, start:end],
                    past_key_values=cache,
                    use_cache=cache is not None,
                    **({} if reader is None else {"output_hidden_states": True}),
                )
            if reader is not None:
                reader.read(start, output.hidden_states)
            return output.last_hidden_state

        if not span:
            _, hidden = self.latent_window(run(embeds, 0, cache))
            return Encoded(hidden, (embeds,), hidden)
        place = self._place(span)
        is_thought: Any = input_ids == self.latent_token_id
        context, window = self.latent_context, self.latent_window
        thoughts = _Thoughts(context, window, place, embeds, attention_mask, is_thought, intervene)
        fed, states = zip(*self._passes(thoughts, run, cache, is_masked=mask.ndim == 4))
        hidden = torch.cat(states, dim=1)
        return Encoded(hidden, fed, hidden if thoughts.sources is None else thoughts.sources)

    def _passes(
        self, thoughts: _Thoughts, run: Run, cache: Cache | None, is_masked: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(embeddings fed, hidden states), each (B, columns, D), of columns from left to right."""
        if self.solver is None:
            cache = self._new_cache(thoughts.embeds.shape[1]) if cache is None else cache
            return list(thoughts.in_turn(functools.partial(run, cache=cache)))
        if not is_masked:
            raise ModelError(
                f"solver: {type(self.base_causallm).__name__} makes its own attention mask, so that thoughts of one "
                "iteration would see those of another; compute them one after another (solver: null)"
            )
        passes = JacobiPasses(self.solver, thoughts.span, thoughts.embeds, thoughts.at_once, run, self._new_cache)
        return passes.in_training() if cache is None else passes.into(cache)

    def _new_cache(self, n_columns: int) -> Cache:
        if self.speed_layer is not None:
            return self.speed_layer.cache(n_columns)
        return DynamicCache(config=self.base_causallm.config)

    def _place(self, span: tuple[int, ...]) -> tuple[int, int]:
        first, end = span
        if self.latent_token_id is None:
            raise ValueError(f"thought_span {span}: this model was built without latent_token_id")
        if first == 0:
            raise ValueError("a thought stands in column 0, where no hidden state precedes it; put a token before it")
        return first, end

    def _find_thoughts(self, input_ids: torch.Tensor) -> tuple[int, ...]:
        if self.latent_token_id is None:
            return ()
        columns = (input_ids == self.latent_token_id).any(dim=0).nonzero()
        return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else ()


class _Thoughts:
    """What is fed at the thought columns of a batch, made from the states of earlier columns."""

    def __init__(
        self,
        context: LatentContext,
        window: LatentWindow,
        span: tuple[int, int],
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        is_thought: torch.Tensor,
        intervene: Intervention | None,
    ):
        """embeds (B, T, D) of the tokens; attention_mask and is_thought (B, T)."""
        self._context, self._window = context, window
        self.span, self.embeds = span, embeds
        self._is_thought, self._intervene = is_thought, intervene
        self._first_real = attention_mask.argmax(dim=1)  # (B,)
        self._norm = wanted_norm(context, embeds, attention_mask, is_thought)
        self.sources: torch.Tensor | None = None
        """The states that `at_once` was called with last."""

    def in_turn(self, run: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (embeddings fed, hidden states), each (B, columns, D), of the prefix, each thought, and the tail."""
        first, end = self.span
        fed = self.embeds[:, :first]
        weights, hidden = self._window(run(fed, 0))
        yield fed, hidden
        recent = hidden[:, -self._context.reach :].flip(1)  # (B, J, D), newest first
        for column in range(first, end):
            fed = self._at(column, recent, weights)[:, None]
            if column == end - 1:
                fed = torch.cat([fed, self.embeds[:, end:]], dim=1)
            hidden = run(fed, column)
            yield fed, hidden
            recent = torch.cat([hidden[:, :1], recent], dim=1)[:, : self._context.reach]

    def at_once(self, states: torch.Tensor) -> torch.Tensor:
        """All of them (B, k, D) from the states (B, end, D) of an earlier iteration."""
        self.sources = states.detach()
        weights, states = self._window(states)
        reach = self._context.reach
        columns = range(*self.span)
        recent = [states[:, max(0, column - reach) : column].flip(1) for column in columns]
        return torch.stack([self._at(column, each, weights) for column, each in zip(columns, recent)], dim=1)

    def _at(self, column: int, recent: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What is fed at `column` (B, D), from `recent` states (B, J, D), newest first."""
        is_thought = self._is_thought
        available = states_in_reach(self._context.scope, column, self._first_real, is_thought[:, column - 1])
        thought = self._window.projected(next_thought(recent, available, weights))
        thought = scaled(thought, self._norm)  # (B, D)
        if self._intervene is not None:
            number = torch.where(is_thought[:, column], is_thought[:, :column].sum(dim=1), -1)
            thought = self._intervene(number, thought)
        # In another row this column can be an ordinary token.
        return torch.where(is_thought[:, column, None], thought, self.embeds[:, column])
