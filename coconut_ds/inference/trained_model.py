"""A trained model, loaded from its folder without a run file, and the prompts of its evaluation.

Under a reversed curriculum these have steps before the thoughts as long as any remain; here thoughts always stand right
behind the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coconut_ds.checkpoints.weights import check_intact
from coconut_ds.data.batches import Batch, Tokens, collate_prompts, prompt_sequence, to_device
from coconut_ds.data.plain_text import reserved_in
from coconut_ds.data.prompts import question_ids, role_token_in
from coconut_ds.data.stages import Curriculum, Layout
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Answered, Question, ask, quoted
from coconut_ds.model import fast
from coconut_ds.model.backbone import demand_rows, n_positions
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.folder import model_folder
from coconut_ds.model.loading import load_tokenizer
from coconut_ds.model.step_decoder import copy_of, load_decoder, stored_decoder
from coconut_ds.runtime import distributed
from coconut_ds.runtime.torch_settings import prepare_device

_SETTINGS = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
"""Settings that prompts depend on."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, its tokenizer, and what its prompts are made of."""

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens
    curriculum: Curriculum
    stage: int | None
    """The stage of the weights; None if the folder does not say."""

    @classmethod
    def load(cls, name: str, with_step_decoder: bool = False) -> TrainedModel:
        """From a checkpoint of a run, an exported folder, or a hub id.

        `with_step_decoder` loads a checkpoint's copied decoder, too, if it has one. Raises InputError for a damaged
        checkpoint, for a folder that is not a Coconut model or names no method, and for a GPU torch cannot use.
        """
        check_intact(Path(name))
        prepare_device()
        model = Coconut.from_pretrained(name)
        if with_step_decoder and stored_decoder(Path(name)):
            model.step_decoder = copy_of(model.base_causallm)
            load_decoder(model.step_decoder, Path(name))
        model.to(distributed.device())
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

    def thoughts_of(self, question: Question) -> int:
        """Thoughts, or pauses, in its prompt: its own number, or that of the evaluation of the weights' stage.

        A question with an unknown number of steps counts as one of `max_latent_stage` steps. Raises InputError if it
        has no number of its own and the stage is unknown.
        """
        if self.tokens.latent is None:
            return 0
        if question.n_thoughts is not None:
            return question.n_thoughts
        if self.stage is None:
            raise InputError("coconut.json names no stage the weights were trained to; say how many thoughts to take")
        curriculum, n_steps = self.curriculum, question.n_steps
        return curriculum.prompt_thoughts(self.stage, curriculum.max_latent_stage if n_steps is None else n_steps)

    def layout(self, n_steps: int, n_thoughts: int) -> Layout:
        """Of a prompt with `n_thoughts` thoughts: in the last stage they replace all steps, before it one a group."""
        curriculum, stage = self.curriculum, self.stage
        layout = curriculum.layout(curriculum.max_latent_stage + 1 if stage is None else stage, n_steps)
        n_groups = n_thoughts // curriculum.thoughts_per_step
        n_skip = n_steps if layout.n_skip == n_steps else min(n_groups, n_steps)
        return replace(layout, n_skip=n_skip, n_thoughts=n_thoughts)

    def room(self, questions: Sequence[Question], new_tokens: int | None = None) -> int:
        """Tokens each answer may have: `new_tokens`, by default those of the run's evaluations or the positions left.

        Raises InputError for the first question that does not fit the model's positions, or that `prompts` refuses.
        """
        positions = n_positions(self.model.base_causallm)
        counts = [self.thoughts_of(each) for each in questions]
        lengths = [self.prompts([each.text], [count]).n_tokens for each, count in zip(questions, counts)]
        usual = int(self.model.training_settings.get("max_new_tokens", 128))  # or the trainer's default
        room = new_tokens or max(1, min(usual, positions - max(lengths)))
        for question, count, length in zip(questions, counts, lengths):
            if length + room > positions:
                raise InputError(
                    f"{question.name}: a prompt of {length} tokens ({count} of them thoughts) and {room} to generate "
                    f"need {length + room} positions, the model has {positions}; lower --thoughts or --max-new-tokens, "
                    "shorten the question, or leave it out"
                )
        return room

    def ask(self, questions: Sequence[Question], new_tokens: int, **options: Any) -> Answered:
        """`replies.ask` in the prompts of the evaluation."""
        prompts = self.prompts([each.text for each in questions], [self.thoughts_of(each) for each in questions])
        match = self.model.training_settings.get("answer_match", "text")
        return ask(self.model, self.tokenizer, questions, prompts, new_tokens, match, **options)

    def prompts(self, questions: Sequence[str], n_thoughts: Sequence[int]) -> Batch:
        """A left-padded decoding batch on this rank's device: each question with its number of thoughts.

        Raises InputError for a question that holds the text of a token that sequences are built with.
        """
        prompt_format = self.model.training_settings.get("prompt_format", "plain")
        rows = [{"question_ids": ids} for ids in question_ids(questions, self.tokenizer, prompt_format)]
        for question, row in zip(questions, rows):
            if prompt_format == "chat":
                name = role_token_in(question, self.tokenizer)
            else:
                name = reserved_in(question, row["question_ids"], self.tokenizer)
            if name is not None:
                raise InputError(
                    f"question {quoted(question)} holds {name!r}, a token that sequences are built with; write it "
                    "otherwise"
                )
        sequences = [prompt_sequence(row, Layout(0, count), self.tokens) for row, count in zip(rows, n_thoughts)]
        batch = collate_prompts(sequences, list(range(len(rows))), self.tokens.pad)
        return batch._replace(inputs=to_device(batch.inputs))


def curriculum_of(settings: dict[str, Any]) -> Curriculum:
    """The curriculum in `coconut.json`, as far as prompts depend on it."""
    return Curriculum(
        method=settings["method"],
        thoughts_per_step=settings["c_thought"],
        epochs_per_stage=1,
        max_latent_stage=settings["max_latent_stage"],
        pad_latent_to_max=settings["pad_latent_to_max"],
        uniform_prob=0.0,
        seed=0,
        curriculum=settings["curriculum"],
    )
