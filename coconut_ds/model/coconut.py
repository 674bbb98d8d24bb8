"""The multi-pass forward of Coconut, and the loss on supervised tokens.

Shapes: B rows, T columns, D hidden size, V vocabulary, N supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from coconut_ds.data.batches import Tokens, supervised_entries
from coconut_ds.data.step_targets import StepTargets
from coconut_ds.data.teacher import Teacher
from coconut_ds.errors import InputError
from coconut_ds.model import folder as pretrained
from coconut_ds.model.decoding import decode
from coconut_ds.model.distillation import Distillation, StatesAt, teacher_losses
from coconut_ds.model.loading import load_model, load_tokenizer
from coconut_ds.model.loss import summed_cross_entropy
from coconut_ds.model.passes import TOKEN_IDS, LatentPasses
from coconut_ds.model.self_check import demand_fit
from coconut_ds.model.step_decoder import written_steps_loss


@dataclass
class CoconutOutput(ModelOutput):
    """`loss` is the mean over supervised tokens, `loss_sum` their sum and `n_targets` their number (0-d tensors).

    `logits` (B, T, V) is filled only when no labels were given, `step_loss_sum` (0-d) only with `steps`, the last three
    (0-d) only with a `teacher`.
    """

    loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    n_targets: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    step_loss_sum: torch.Tensor | None = None
    verbal_loss_sum: torch.Tensor | None = None
    distance_sum: torch.Tensor | None = None
    direct_loss_sum: torch.Tensor | None = None

    @property
    def sums_of_losses(self) -> tuple[torch.Tensor | None, ...]:
        """One of each loss, in the order of `training.step.LOSSES`."""
        of_teacher = (self.verbal_loss_sum, self.distance_sum, self.direct_loss_sum)
        return self.loss_sum, self.step_loss_sum, *of_teacher


def _token_ids(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> dict[str, int | None]:
    """The ids of the tokenizer's marker tokens, for folders that do not store them."""
    tokens = Tokens.of(settings["method"], tokenizer)
    ids = (tokens.thought, tokens.start_latent, tokens.end_latent, tokenizer.eos_token_id)
    return dict(zip(TOKEN_IDS, ids, strict=True))


class Coconut(LatentPasses):
    """The passes with a loss, decoding, loading and saving. `base_causallm` is not changed without `fast.install`.

    Raises ModelError for a `base_causallm` that the passes, or decoding, do not fit (model/self_check.py).
    """

    distillation: Distillation | None = None
    """How states are compared with those of a teacher, where a batch has one; None compares nothing."""

    def _demand_fit(self) -> None:
        demand_fit(self)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Coconut:
        """Load a folder or hub id written by `save_pretrained` or by a run, also a checkpoint folder.

        In fp32 and evaluation mode, as in transformers. Raises InputError for a folder without a Coconut model.
        """
        name = str(name)
        settings = pretrained.stored_settings(name)
        if settings is None:
            raise InputError(pretrained.where_it_is(name))
        folder = str(pretrained.model_folder(name))
        ids = settings.get("token_ids") or _token_ids(load_tokenizer(folder), settings)
        if set(ids) != set(TOKEN_IDS):
            raise InputError(f"{name}: token_ids of coconut.json has {', '.join(ids)}; save the model again")
        context, solver = pretrained.latent_context(settings), pretrained.solver_of(settings)
        model = cls(load_model(folder), **ids, latent_context=context, solver=solver)
        pretrained.load_window(model.latent_window, name)
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
        """Write what `from_pretrained` loads: the backbone as transformers saves it, latent settings, a model card.

        With the `tokenizer` the folder is complete. Results of an evaluation are left out, since the weights may have
        been trained after it. `push_to_hub` uploads the folder to `repo_id`, by default its name. Raises InputError if
        the hub rejects it.
        """
        folder = Path(folder)
        settings = {
            **{key: value for key, value in self.training_settings.items() if key != "results"},
            "latent_context": pretrained.context_settings(self.latent_context),
            "latent_norm": self.latent_context.norm,
            "latent_projection": self.latent_context.projection,
            "solver": pretrained.solver_settings(self.solver),
            "token_ids": {name: getattr(self, name) for name in TOKEN_IDS},
        }
        window = {f"latent_window.{name}": value for name, value in self.latent_window.state_dict().items()}
        pretrained.write_folder(folder, self.base_causallm, tokenizer, settings, window=window)
        if push_to_hub:
            pretrained.push(folder, repo_id or folder.name, private)

    def enable_activation_checkpointing(self, every_n_layers: int = 1, offload: bool = False) -> None:
        """Keep only the input, keys and values of every `every_n_layers`-th decoder layer and recompute the rest.

        Same loss and gradients, dropout included. Passes of one column, the thoughts, are kept whole. `offload` moves
        the layer inputs of the prefix to pinned host memory; on a CPU it only warns. Raises ValueError without
        `fast.install`, whose KV cache it needs, for a model whose layers cannot be checkpointed, and if it is on
        already.
        """
        if self.speed_layer is None:
            raise ValueError(
                "activation checkpointing needs the KV cache of the speed layer: call "
                "coconut_ds.model.fast.install(model) first"
            )
        self.speed_layer.checkpoint_layers(every_n_layers, offload)

    def disable_activation_checkpointing(self) -> None:
        """Undo `enable_activation_checkpointing`; does nothing if it is off."""
        if self.speed_layer is not None:
            self.speed_layer.restore_layers()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        thought_span: Sequence[int] | None = None,
        supervised: torch.Tensor | None = None,
        steps: StepTargets | None = None,
        teacher: Teacher | None = None,
    ) -> CoconutOutput:
        """All tensors (B, T). Labels are -100 for ignored columns; a label is predicted from the column before it.

        `thought_span` is (first thought column of the batch, one past the last), or () for a batch without thoughts.
        `supervised` (N,) holds row * T + column of every label that counts. The collator provides both; by default they
        are read from the tensors, which synchronises with a GPU. `steps` says what to write from thoughts
        (model/step_decoder.py), `teacher` what the model reads without them (model/distillation.py).

        Raises ValueError for a thought in column 0, or if HF's own checkpointing, which drops the cache, is on in
        training.
        """
        reader = None
        if teacher is not None and self.distillation is not None:
            reader = StatesAt(self.distillation, teacher.student, input_ids.shape[1])
        encoded = self.encode(input_ids, attention_mask, position_ids, thought_span, reader=reader)
        if labels is None:
            return CoconutOutput(logits=self.lm_head(encoded.hidden))
        if supervised is None:
            supervised = supervised_entries(labels)
        # A label is predicted from the state one column earlier.
        states = encoded.hidden.flatten(0, 1).index_select(0, supervised - 1)  # (N, D)
        loss_sum = summed_cross_entropy(self.lm_head, states, labels.flatten().index_select(0, supervised))
        n_targets = len(supervised)
        written = None if steps is None else written_steps_loss(self, encoded.inputs_embeds, steps)
        output = CoconutOutput(loss_sum / max(n_targets, 1), loss_sum, torch.tensor(n_targets), step_loss_sum=written)
        if teacher is not None:
            losses = teacher_losses(self, teacher, self.distillation, reader.found if reader else ())
            output.verbal_loss_sum, output.distance_sum, output.direct_loss_sum = losses
        return output

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
