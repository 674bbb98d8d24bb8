"""A trained model as it was saved: what asks it questions and looks at its thoughts needs no run file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import PreTrainedTokenizerBase

from coconut_ds.checkpoints.weights import check_intact
from coconut_ds.data.batches import Batch, Tokens, collate_prompts, prompt_sequence, to_device
from coconut_ds.data.plain_text import reserved_in
from coconut_ds.data.stages import Curriculum
from coconut_ds.errors import InputError
from coconut_ds.model import fast
from coconut_ds.model.backbone import demand_rows
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.folder import model_folder
from coconut_ds.model.loading import load_tokenizer
from coconut_ds.runtime import distributed

_SETTINGS = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
"""What prompts cannot be made without."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, its tokenizer, and the prompts it was trained on."""

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    curriculum: Curriculum
    stage: int | None
    """The stage of the weights; None where the folder does not say."""

    @classmethod
    def load(cls, name: str) -> TrainedModel:
        """From a checkpoint of a run, an exported folder, or a hub id.

        Raises InputError for a damaged checkpoint, and for what is no Coconut model or does not say its method.
        """
        check_intact(Path(name))
        model = Coconut.from_pretrained(name).to(distributed.device())
        fast.install(model)
        settings = model.training_settings
        if missing := [key for key in _SETTINGS if key not in settings]:
            what = "method it was trained by" if "method" in missing else ", ".join(missing)
            raise InputError(f"{name}: coconut.json names no {what}; name a checkpoint of a run")
        tokenizer = load_tokenizer(str(model_folder(name)))
        demand_rows(model.base_causallm, tokenizer, name)
        tokens = Tokens.of(settings["method"], tokenizer)
        if tokens.thought != model.latent_token_id and tokens.thought is not None:
            raise InputError(
                f"{name}: coconut.json says that token {model.latent_token_id} stands for a thought, the tokenizer has "
                f"{tokens.thought} for it; copy the folder again"
            )
        return cls(model, tokenizer, tokens, curriculum_of(settings), settings.get("stage"))

    @property
    def usual_new_tokens(self) -> int:
        """Tokens an answer may have in the run's evaluations; 128, the trainer's default, where that is not known."""
        return int(self.model.training_settings.get("max_new_tokens", 128))

    def n_thoughts(self, n_steps: int | None = None) -> int:
        """Thoughts in the prompt of a question of `n_steps` steps, as in the evaluation of the weights' stage.

        Of a question whose steps are not known as many as of one with `max_latent_stage` steps. Raises InputError where
        the stage is not known either.
        """
        if self.stage is None:
            raise InputError("coconut.json names no stage the weights were trained to; say how many thoughts to take")
        return self.curriculum.prompt_thoughts(
            self.stage, self.curriculum.max_latent_stage if n_steps is None else n_steps
        )

    def prompts(self, questions: Sequence[str], n_thoughts: Sequence[int]) -> Batch:
        """A decoding batch, left-padded, on this rank's device: questions with as many thoughts each.

        Raises InputError for a question with the text of a token that sequences are built with.
        """
        rows = [{"question_ids": self.tokenizer(question + "\n")["input_ids"]} for question in questions]
        for question, row in zip(questions, rows):
            name = reserved_in(question, row["question_ids"], self.tokenizer)
            if name is not None:
                raise InputError(
                    f"question {shorten(question, 60, placeholder=' ..')!r} holds {name!r}, a token that sequences are "
                    "built with; write it otherwise"
                )
        sequences = [prompt_sequence(row, count, self.tokens) for row, count in zip(rows, n_thoughts)]
        batch = collate_prompts(sequences, list(range(len(rows))), self.tokens.pad)
        return batch._replace(inputs=to_device(batch.inputs))


def curriculum_of(settings: dict[str, Any]) -> Curriculum:
    """The curriculum that `coconut.json` describes, as far as prompts depend on it."""
    return Curriculum(
        method=settings["method"],
        thoughts_per_step=settings["c_thought"],
        epochs_per_stage=1,
        max_latent_stage=settings["max_latent_stage"],
        pad_latent_to_max=settings["pad_latent_to_max"],
        uniform_prob=0.0,
        seed=0,
    )
