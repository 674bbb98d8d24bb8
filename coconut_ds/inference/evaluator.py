"""Evaluation: loss in the training layout, exact match of decoded answers, each example counted once."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from coconut_ds.data.answers import before_eos, clean_answer, clean_chain, given_answer, given_chain, is_cut, text_of
from coconut_ds.data.batches import Batch, Tokens, to_device
from coconut_ds.data.loaders import loss_loader, prompt_loader
from coconut_ds.data.stages import Curriculum
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.decoding import decode
from coconut_ds.model.thoughts import Readings, read_thoughts, top_tokens
from coconut_ds.runs.terminal import progress
from coconut_ds.runtime import distributed, watchdog


@dataclass(frozen=True)
class Evaluation:
    """Figures of one set in one stage. `mean_new_tokens` counts thoughts and generated tokens before EOS.

    `mean_thoughts` of them are thoughts. `n_cut` answers were ended by `max_new_tokens`, without an EOS.
    `examples_per_s` is that of decoding, by the slowest rank.
    """

    valid_loss: float
    accuracy: float
    cot_match: float
    n_correct: int
    n_total: int
    mean_new_tokens: float
    examples_per_s: float
    accuracy_by_steps: dict[str, float]
    mean_thoughts: float
    n_cut: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one set; `batch_size` in examples per rank."""

    model: Coconut
    examples: Dataset
    curriculum: Curriculum
    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_new_tokens: int

    @torch.no_grad()
    def run(self, stage: int) -> tuple[Evaluation, list[dict[str, Any]]] | None:
        """The figures and one prediction per example in file order, on rank 0; None on the others."""
        was_training = self.model.training
        self.model.eval()
        try:
            loss = self.loss(stage)
            prompts = self._prompts(stage)
            predicted = [self._predict(batch) for batch in progress(prompts, len(prompts), "evaluating, answers")]
            rows = [row for some, _ in predicted for row in some]
            shares = distributed.gather_to_main((rows, sum(seconds for _, seconds in predicted)))
        finally:
            self.model.train(was_training)
        if shares is None:
            return None
        predictions = sorted((row for part, _ in shares for row in part), key=lambda row: row["index"])
        return summarize(predictions, loss, max(seconds for _, seconds in shares)), predictions

    def loss(self, stage: int) -> float:
        """Mean loss over all supervised tokens of the set in the layout of `stage`, the same on every rank."""
        totals = torch.zeros(2, dtype=torch.float64)
        world, rank = distributed.world_size(), distributed.rank()
        loader = loss_loader(self.examples, self.curriculum, self.tokens, stage, self.batch_size, rank, world)
        for batch in progress(loader, len(loader), "evaluating, loss"):
            watchdog.alive()
            output = self.model(**to_device(batch.inputs))
            totals += torch.tensor([output.loss_sum.item(), batch.n_targets], dtype=torch.float64)
        loss_sum, n_targets = distributed.sum_over_ranks(totals.to(distributed.device())).tolist()
        return loss_sum / n_targets

    def _prompts(self, stage: int) -> DataLoader:
        world, rank = distributed.world_size(), distributed.rank()
        return prompt_loader(self.examples, self.curriculum, self.tokens, stage, self.batch_size, rank, world)

    def _predict(self, batch: Batch) -> tuple[list[dict[str, Any]], float]:
        """A batch's predictions, and the seconds that decoding them took."""
        watchdog.alive()
        started = time.monotonic()
        inputs = to_device(batch.inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        decoded = decode(self.model, ids, mask, self.max_new_tokens, inputs["thought_span"])
        new_tokens = decoded.tokens.tolist()
        seconds = time.monotonic() - started
        thoughts: list[Readings] = [[] for _ in batch.indices]
        if inputs["thought_span"] and decoded.encoded is not None:
            thoughts = top_tokens(self.model, read_thoughts(self.model, decoded.encoded, ids, mask), self.tokenizer)
        rows = zip(batch.indices, new_tokens, thoughts)
        return [self._prediction(*row) for row in rows], seconds

    def _prediction(self, index: int, ids: list[int], thoughts: Readings) -> dict[str, Any]:
        example = self.examples[index]
        cut = is_cut(ids, self.tokenizer)
        ids = before_eos(ids, self.tokenizer)
        text = text_of(ids, self.tokenizer)
        expected, chain = clean_answer(example["answer"]), clean_chain(example["steps"])
        given = given_answer(text, expected)
        return {
            "index": index,
            "question": example["question"],
            "expected": expected,
            "given": given,
            "correct": given == expected,
            "cot_correct": given_chain(text, chain) == chain,
            "text": text,
            "n_steps": len(example["steps"]),
            "n_thoughts": len(thoughts),
            "n_new_tokens": len(ids),
            "cut": cut,
            "thoughts": thoughts,
        }


def summarize(predictions: list[dict[str, Any]], loss: float, seconds: float) -> Evaluation:
    """Figures from the predictions of a whole set."""
    total = len(predictions)
    by_steps = defaultdict(list)
    for row in predictions:
        by_steps[row["n_steps"]].append(row["correct"])
    n_correct = sum(row["correct"] for row in predictions)
    return Evaluation(
        valid_loss=loss,
        accuracy=n_correct / total,
        cot_match=sum(row["cot_correct"] for row in predictions) / total,
        n_correct=n_correct,
        n_total=total,
        mean_new_tokens=sum(row["n_thoughts"] + row["n_new_tokens"] for row in predictions) / total,
        examples_per_s=total / seconds,
        accuracy_by_steps={str(steps): sum(hits) / len(hits) for steps, hits in sorted(by_steps.items())},
        mean_thoughts=sum(row["n_thoughts"] for row in predictions) / total,
        n_cut=sum(row["cut"] for row in predictions),
    )
