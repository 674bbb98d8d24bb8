"""The findings of an inspection, for one question or averaged over a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from coconut_ds.analysis.inspection.averages import average_next_steps, average_readings, describe
from coconut_ds.analysis.inspection.graphs import QuestionGraph, graph_of
from coconut_ds.analysis.inspection.interventions import intervene
from coconut_ds.analysis.inspection.next_steps import NextStep, next_steps
from coconut_ds.analysis.inspection.readings import QuestionReading, read
from coconut_ds.analysis.inspection.written_steps import WrittenStep, average_written, written_steps
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Question, Reply
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.runs.terminal import progress

Records = Sequence[tuple[int, dict[str, Any]]]
"""Records of a data file with their index in it."""


@dataclass(frozen=True)
class Inspection:
    """Questions to a trained model, answered in batches of `batch_size`."""

    trained: TrainedModel
    records: Records
    questions: list[Question]
    new_tokens: int
    batch_size: int
    top_k: int

    @classmethod
    def of(
        cls,
        trained: TrainedModel,
        records: Records,
        n_thoughts: int | None = None,
        new_tokens: int | None = None,
        batch_size: int = 16,
        top_k: int = 5,
    ) -> Inspection:
        """Raises InputError for a model, or a stage, without thoughts, and for prompts that do not fit the model."""
        questions = questions_of(trained, records, n_thoughts)
        return cls(trained, records, questions, trained.room(questions, new_tokens), batch_size, top_k)

    def of_question(self, writes_steps: bool = False) -> dict[str, Any]:
        """The findings for the first question; `writes_steps` adds what is written from its thoughts."""
        graphs, why_no_graph = self._graphs()
        readings, _, _ = self.answers
        steps = self._next_steps(graphs)
        found = {**self._head(why_no_graph), **asdict(readings[0])}
        if graphs:
            found["graph"] = graphs[0].shown()
            found["next_steps"] = [describe(graphs[0], each) for each in steps[0]]
        if writes_steps:
            found |= {"writer": self._writer, "written_steps": [asdict(each) for each in self._written_steps()[0]]}
        return found

    def of_file(self, seed: int | None = None, writes_steps: bool = False) -> dict[str, Any]:
        """Averages over all questions; with interventions if there is a `seed`, which pairs questions."""
        graphs, why_no_graph = self._graphs()
        readings, replies, fed = self.answers
        steps = self._next_steps(graphs)
        found = {**self._head(why_no_graph), **average_readings(readings)}
        if graphs:
            found["next_steps"] = average_next_steps(graphs, steps)
        if seed is not None:
            outcomes = intervene(self.trained, replies, fed, self.new_tokens, self.batch_size, seed)
            found["interventions"] = [asdict(each) for each in outcomes]
        if writes_steps:
            found |= {"writer": self._writer, "written_steps": average_written(self._written_steps())}
        return found

    def _head(self, why_no_graph: str | None) -> dict[str, Any]:
        return {"why_no_graph": why_no_graph, "max_new_tokens": self.new_tokens}

    def _batches(self, count: int, title: str) -> Iterator[slice]:
        starts = range(0, count, self.batch_size)
        for start in progress(starts, len(starts), title):
            yield slice(start, start + self.batch_size)

    def _graphs(self) -> tuple[list[QuestionGraph], str | None]:
        """The graphs of all questions; none, with the first reason, if a question has none."""
        found = [(index, graph_of(record)) for index, record in self.records]
        graphs = [graph for _, graph in found if not isinstance(graph, str)]
        if len(graphs) == len(found):
            return graphs, None
        first = next(f"record {index} {reason}" for index, reason in found if isinstance(reason, str))
        count = f" ({len(found) - len(graphs)} of {len(found)} records have none)" if graphs else ""
        return [], f"{first}{count}"

    @cached_property
    def answers(self) -> tuple[list[QuestionReading], list[Reply], list[torch.Tensor]]:
        """For each question the readings, the reply, and the vectors fed for its thoughts, (thoughts, D)."""
        readings: list[QuestionReading] = []
        replies: list[Reply] = []
        fed: list[torch.Tensor] = []
        for batch in self._batches(len(self.questions), "thoughts"):
            answered = self.trained.ask(self.questions[batch], self.new_tokens)
            thoughts = answered.thoughts()
            readings += read(self.trained, answered, thoughts, self.top_k)
            replies += answered.replies
            fed += [row[:count] for row, count in zip(thoughts.fed, thoughts.counts.tolist())]
        return readings, replies, fed

    @property
    def _writer(self) -> str:
        return "model" if self.trained.model.step_decoder is None else "copied decoder"

    def _written_steps(self) -> list[list[WrittenStep]]:
        _, _, fed = self.answers
        return written_steps(self.trained, [record for _, record in self.records], fed, self.batch_size)

    def _next_steps(self, graphs: Sequence[QuestionGraph]) -> list[list[NextStep]]:
        counts = [self.trained.thoughts_of(each) for each in self.questions]
        found: list[list[NextStep]] = []
        for batch in self._batches(len(graphs), "next steps"):
            found += next_steps(self.trained, graphs[batch], counts[batch], self.batch_size)
        return found


def questions_of(trained: TrainedModel, records: Records, n_thoughts: int | None = None) -> list[Question]:
    """The records as questions with `n_thoughts` thoughts each, by default the number of the evaluation.

    Raises InputError for a model, or a stage, without thoughts.
    """
    if trained.tokens.thought is None:
        method = trained.curriculum.method
        raise InputError(f"the model was trained by {method}, which has no thoughts to inspect; name one of coconut")
    questions = [Question.of(record, index, n_thoughts) for index, record in records]
    if not any(map(trained.thoughts_of, questions)):
        raise InputError(f"no thoughts in stage {trained.stage}; name a later checkpoint, or give --thoughts N")
    return questions
