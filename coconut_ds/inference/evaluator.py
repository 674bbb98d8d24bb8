"""Evaluates a set: loss in the training layout and accuracy of decoded answers, each example once over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from coconut_ds.data.answers import AnswerMatch
from coconut_ds.data.batches import Batch, Tokens, to_device
from coconut_ds.data.loaders import loss_loader, prompt_loader
from coconut_ds.data.stages import Curriculum
from coconut_ds.inference.replies import Question, Reply, ask
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.thought_readings import Readings
from coconut_ds.runs.terminal import progress
from coconut_ds.runtime import distributed, watchdog


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one set in one stage. `mean_new_tokens` counts thoughts and generated tokens before EOS.

    `mean_thoughts` of them are thoughts. `n_cut` answers reached `max_new_tokens` without an EOS. `examples_per_s` is
    the decoding rate of the slowest rank.
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
    """Evaluates one set; `batch_size` in examples per rank, `num_workers` as in the run file."""

    model: Coconut
    examples: Dataset
    curriculum: Curriculum
    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_new_tokens: int
    num_workers: int | None = None
    answer_match: AnswerMatch = "text"

    @torch.no_grad()
    def run(self, stage: int) -> tuple[Evaluation, list[dict[str, Any]]] | None:
        """Metrics and one prediction per example in file order, on rank 0; None on the others."""
        was_training = self.model.training
        self.model.eval()
        try:
            loss = self.loss(stage)
            prompts = self._loader(prompt_loader, stage)
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
        loader = self._loader(loss_loader, stage)
        for batch in progress(loader, len(loader), "evaluating, loss"):
            watchdog.alive()
            output = self.model(**to_device(batch.inputs))
            totals += torch.tensor([output.loss_sum.item(), batch.n_targets], dtype=torch.float64)
        loss_sum, n_targets = distributed.sum_over_ranks(totals.to(distributed.device())).tolist()
        return loss_sum / n_targets

    def _loader(self, of: Callable[..., DataLoader], stage: int) -> DataLoader:
        """This rank's share of the set."""
        world, rank = distributed.world_size(), distributed.rank()
        share = (self.batch_size, rank, world, self.num_workers)
        return of(self.examples, self.curriculum, self.tokens, stage, *share)

    def _predict(self, batch: Batch) -> tuple[list[dict[str, Any]], float]:
        """Predictions of a batch, and the seconds spent decoding."""
        watchdog.alive()
        questions = [Question.of(self.examples[index], index) for index in batch.indices]
        answered = ask(self.model, self.tokenizer, questions, batch, self.max_new_tokens, self.answer_match)
        rows = zip(answered.replies, answered.readings(self.tokenizer))
        return [_prediction(*row) for row in rows], answered.seconds


def _prediction(reply: Reply, thoughts: Readings) -> dict[str, Any]:
    question = reply.question
    return {
        "index": question.index,
        "question": question.text,
        "expected": question.expected,
        "given": reply.given,
        "correct": reply.correct,
        "cot_correct": reply.chain_correct,
        "text": reply.text,
        "n_steps": question.n_steps,
        "n_thoughts": len(thoughts),
        "n_new_tokens": reply.n_new_tokens,
        "cut": reply.cut,
        "thoughts": thoughts,
    }


def summarize(predictions: list[dict[str, Any]], loss: float, seconds: float) -> Evaluation:
    """Metrics from the predictions of a whole set; `seconds` is the decoding time of the slowest rank."""
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
