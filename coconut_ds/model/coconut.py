"""The multi-pass forward of Coconut, and the loss on supervised tokens.

Shapes: B rows, T columns, D hidden size, V vocabulary, N supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from coconut_ds.config.methods import METHODS
from coconut_ds.data.markers import END_LATENT, LATENT, START_LATENT
from coconut_ds.errors import InputError
from coconut_ds.model import folder as pretrained
from coconut_ds.model.backbone import fuse_gelu, load_model, load_tokenizer, marker_ids
from coconut_ds.model.decoding import decode, takes_static_cache
from coconut_ds.model.fast.checkpointing import checkpoint_layers, restore_layers
from coconut_ds.model.fast.deferred import Deferred
from coconut_ds.model.fast.kv_cache import TrainingCache
from coconut_ds.model.fast.thought_attention import gather_attention_gradients
from coconut_ds.model.fast.weight_gradients import Pass, gather_weight_gradients, within
from coconut_ds.model.latents import LatentContext, LatentWindow, next_thought, scaled, states_in_reach, wanted_norm
from coconut_ds.model.loss import summed_cross_entropy
from coconut_ds.model.masks import causal_mask, columns_of
from coconut_ds.model.self_check import demand_fit

IGNORED_LABEL = -100

Intervention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(number (B,), thought (B, D)) -> (B, D): what is fed in place of the `number`-th thought, from 0, of each row.

`number` is -1 in a row whose column holds an ordinary token, which stays.
"""


@dataclass
class CoconutOutput(ModelOutput):
    """`loss` is the mean over supervised tokens, `loss_sum` their sum and `n_targets` their number (0-d tensors).

    `logits` (B, T, V) is filled only when no labels were given.
    """

    loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    n_targets: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """All columns after the passes: hidden states after the final norm, and the embeddings that were fed."""

    hidden: torch.Tensor
    """(B, T, D)"""
    fed: Sequence[torch.Tensor]
    """What each pass was fed, (B, columns, D) each."""

    @property
    def inputs_embeds(self) -> torch.Tensor:
        """(B, T, D), thoughts filled in."""
        return torch.cat(tuple(self.fed), dim=1)


def _token_ids(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> dict[str, int | None]:
    """Ids by their marker tokens, for folders that do not name them."""
    traits = METHODS[settings["method"]]
    ids = {} if traits.thoughts == "none" else marker_ids(tokenizer)
    return {
        "latent_token_id": ids.get(LATENT) if traits.thoughts == "continuous" else None,
        "start_latent_id": ids.get(START_LATENT) if traits.has_markers else None,
        "end_latent_id": ids.get(END_LATENT) if traits.has_markers else None,
        "eos_token_id": tokenizer.eos_token_id,
    }


class Coconut(nn.Module):
    """A causal language model whose `<|latent|>` positions are fed earlier hidden states instead of embeddings.

    The prefix (columns before the first thought of the batch) runs once, then one column per thought on the KV cache;
    the last thought column runs together with the tail. Chain of Continuous Thought, arXiv 2412.06769, section 3.

    Raises ModelError for a `base_causallm` that these passes, or decoding, do not fit (model/self_check.py).
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
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.latent_context = latent_context or LatentContext()
        self.latent_window = LatentWindow(self.latent_context)
        self.training_settings: dict[str, Any] = {}
        """What `coconut.json` says of the run the weights are of; travels with them."""
        self._checkpoints_layers = False
        fuse_gelu(self.base_causallm)
        gather_weight_gradients(self.base_causallm.base_model)
        gather_attention_gradients(self.base_causallm)
        self.decodes_on_static_cache = takes_static_cache(self.base_causallm)
        """Else answers are decoded on a cache that grows."""
        demand_fit(self)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Coconut:
        """The model of a folder or hub id that `save_pretrained` or a run has written; a checkpoint folder will do.

        In fp32 and in evaluation mode, as transformers loads models. Raises InputError for a folder that holds no
        Coconut model.
        """
        name = str(name)
        settings = pretrained.stored_settings(name)
        if settings is None:
            raise InputError(pretrained.where_it_is(name))
        folder = str(pretrained.model_folder(name))
        ids = settings.get("token_ids") or _token_ids(load_tokenizer(folder), settings)
        if set(ids) != {"latent_token_id", "start_latent_id", "end_latent_id", "eos_token_id"}:
            raise InputError(f"{name}: token_ids of coconut.json has {', '.join(ids)}; save the model again")
        model = cls(load_model(folder), **ids, latent_context=pretrained.latent_context(settings))
        pretrained.load_window(model.latent_window.logits, name)
        model.training_settings = settings
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write what `from_pretrained` loads: the backbone as plain transformers has it, latent settings, a model card.

        With the `tokenizer` the folder is complete. Results of an evaluation are left out: they were those of the
        weights loaded, which may have been trained since. `push_to_hub` uploads the folder to `repo_id`, by default its
        name. Raises InputError when the hub does not take it.
        """
        folder = Path(folder)
        settings = {
            **{key: value for key, value in self.training_settings.items() if key != "results"},
            "latent_context": pretrained.context_settings(self.latent_context),
            "latent_norm": self.latent_context.norm,
            "token_ids": {
                "latent_token_id": self.latent_token_id,
                "start_latent_id": self.start_latent_id,
                "end_latent_id": self.end_latent_id,
                "eos_token_id": self.eos_token_id,
            },
        }
        window = {f"latent_window.{name}": value for name, value in self.latent_window.state_dict().items()}
        pretrained.write_folder(folder, self.base_causallm, tokenizer, settings, window=window)
        if push_to_hub:
            pretrained.push(folder, repo_id or folder.name, private)

    def enable_activation_checkpointing(self, every_n_layers: int = 1, offload: bool = False) -> None:
        """Keep only the input, keys and values of every `every_n_layers`-th decoder layer and recompute the rest.

        Same loss and gradients, dropout included. `offload` moves the layer inputs of the prefix to pinned host
        memory; on a CPU it says that it does nothing. Raises ValueError for a model whose layers cannot be
        checkpointed, and when it is on already.
        """
        checkpoint_layers(self.base_causallm, every_n_layers, offload)
        self._checkpoints_layers = True

    def disable_activation_checkpointing(self) -> None:
        """Undo `enable_activation_checkpointing`; nothing happens when it is off."""
        if self._checkpoints_layers:
            restore_layers(self.base_causallm)
        self._checkpoints_layers = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        thought_span: Sequence[int] | None = None,
        supervised: torch.Tensor | None = None,
    ) -> CoconutOutput:
        """All tensors (B, T). Labels are -100 where nothing is learned; a label is predicted from the column before.

        `thought_span` is (first thought column of the batch, one past the last), or () for a batch without thoughts.
        `supervised` (N,) holds row * T + column of every label that counts. The collator knows both; where they are
        missing they are read from the tensors, which on a GPU waits for it.

        Raises ValueError when a thought stands in column 0, or when HF's own checkpointing, which drops the cache, is
        on in training.
        """
        encoded = self.encode(input_ids, attention_mask, position_ids, thought_span)
        if labels is None:
            return CoconutOutput(logits=self.lm_head(encoded.hidden))
        if supervised is None:
            counts = labels != IGNORED_LABEL
            counts[:, 0] = False  # nothing precedes the first column
            supervised = counts.flatten().nonzero().flatten()
        # The state one column earlier predicts a label.
        states = encoded.hidden.flatten(0, 1).index_select(0, supervised - 1)  # (N, D)
        loss_sum = summed_cross_entropy(self.lm_head, states, labels.flatten().index_select(0, supervised))
        n_targets = len(supervised)
        return CoconutOutput(
            loss=loss_sum / max(n_targets, 1),
            loss_sum=loss_sum,
            n_targets=torch.tensor(n_targets),
        )

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
        """Run all passes over (B, T) inputs. A `cache` that is given is empty, and covers every column afterwards.

        `intervene` sees every thought before it is fed and says what is fed in its place.
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
        # -1 for a cache that grows.
        keys = cache.get_max_length() if cache is not None and cache.layers else 0
        if cache is None and span:
            cache = TrainingCache(input_ids.shape[1])
        mask = causal_mask(attention_mask, self.base_causallm.config)
        left: dict[nn.Module, Deferred] = {}

        def run(embeds: torch.Tensor, start: int) -> torch.Tensor:
            """One pass of the backbone without its LM head over the columns from `start` on: (B, columns, D)."""
            end = start + embeds.shape[1]
            # Also where there are no thoughts: gradients must come in one order on every rank, or ZeRO adds up others'.
            with within(Pass(start == 0, left)):
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

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 128,
        thought_span: Sequence[int] | None = None,
        **sampling: Any,
    ) -> torch.Tensor:
        """Continuations (B, max_new_tokens) of left-padded prompts (B, T), right-padded with EOS after EOS.

        Greedy; `sampling` takes do_sample, temperature, top_k, top_p and streamer as transformers' `generate` does.
        """
        return decode(self, input_ids, attention_mask, max_new_tokens, thought_span, **sampling).tokens
