"""The node of a question's graph that the model would continue from after 0..k thoughts (arXiv 2412.06769, section 5).

The model is stopped after k thoughts and `<|end-latent|>`, and its distribution of the following text is read:

    p_k(v) = P(the next step starts from node v)    product of the probabilities of the tokens that begin such a step
    a_k(v) = P(the answer names node v)             the same for its name, after "### " (in sentences "### Alex is a")

A step from a concept begins with "Every jompus", from an entity with "Alex"; in the symbolic form with the node's word;
if a word is an edge, p_k(v) sums over all words "v>...". k counts steps' worth of thoughts: step k + 1 of a solution
starts k edges away from the root, so that in every form, from k = 0, the frontier is at distance k. The rest of the
probability is on no node: "###", with which an answer begins, and everything else.

A model forced to begin a step has p_k(v) / sum_u p_k(u). The paper's p(v | "Every") is the same if the model knows
which concepts the question names and starts from a concept. No step starts from a leaf, such as the target and the
distractor, so knowledge about them shows in a_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from coconut_ds.analysis.inspection.continuations import Continuation, exclusive_probabilities, token_log_probs
from coconut_ds.analysis.inspection.graphs import QuestionGraph
from coconut_ds.errors import InputError
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import n_positions


@dataclass(frozen=True)
class NextStep:
    """The distributions after `n_thoughts` thoughts, over the nodes in the graph's order; they need not sum to 1."""

    n_thoughts: int
    n_replaced: int
    """k, the steps that these thoughts replace."""
    step: list[float]
    answer: list[float]


def among_nodes(probabilities: Sequence[float]) -> list[float]:
    """The distribution given that there is a node: the model is forced to begin a step, or to answer."""
    total = sum(probabilities)
    return [each / total if total else 0.0 for each in probabilities]


def next_steps(
    trained: TrainedModel, graphs: Sequence[QuestionGraph], n_thoughts: Sequence[int], batch_size: int
) -> list[list[NextStep]]:
    """For each graph the distributions after 0, c_thought, 2 c_thought .. `n_thoughts` thoughts.

    All questions run in one batch; `batch_size` limits the rows of texts after them. Raises InputError if these need
    more positions than the model has.
    """
    inputs = trained.prompts([graph.question for graph in graphs], n_thoughts).inputs
    prompts = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]  # without `<|end-latent|>`
    texts = [_Texts.of(graph, trained) for graph in graphs]
    _check_positions(trained, prompts[1], texts)
    a_step = trained.curriculum.thoughts_per_step
    # For each graph every k, and the number of thoughts dropped for it.
    stops = [[(k, most - k * a_step) for k in range(most // a_step + 1)] for most in n_thoughts]
    wanted = [
        Continuation(row, n_dropped, tokens)
        for row, mine in enumerate(stops)
        for _, n_dropped in mine
        for tokens in texts[row].all
    ]
    log_probs = token_log_probs(trained.model, *prompts, wanted, batch_size)
    found: list[list[NextStep]] = [[] for _ in graphs]
    for row, mine in enumerate(stops):
        for k, n_dropped in mine:
            after = {tokens: log_probs[Continuation(row, n_dropped, tokens)] for tokens in texts[row].all}
            found[row].append(NextStep(k * a_step, k, *texts[row].distributions(after)))
    return found


def _check_positions(trained: TrainedModel, attention_mask: torch.Tensor, texts: Sequence[_Texts]) -> None:
    positions = n_positions(trained.model.base_causallm)
    for length, mine in zip(attention_mask.sum(dim=1).tolist(), texts):
        longest = max((len(tokens) for tokens in mine.all), default=0)
        if length + longest > positions:
            raise InputError(
                f"the next step after a prompt of {length} tokens needs {longest} more positions, the model has "
                f"{positions} in all; lower --thoughts"
            )


@dataclass(frozen=True)
class _Texts:
    """Tokens of the texts that begin a step, and of the answers, with the node of each.

    All of them start with `<|end-latent|>`.
    """

    n_nodes: int
    steps: dict[tuple[int, ...], int]
    answers: dict[tuple[int, ...], int]
    n_opening: int
    """Tokens of an answer before the name, without `<|end-latent|>`."""

    @classmethod
    def of(cls, graph: QuestionGraph, trained: TrainedModel) -> _Texts:
        tokenizer, end_latent = trained.tokenizer, trained.tokens.end_latent
        assert end_latent is not None  # of every method with thoughts

        def ids(text: str) -> tuple[int, ...]:
            return end_latent, *tokenizer(text, add_special_tokens=False)["input_ids"]

        def known(texts: Sequence[tuple[int, str]]) -> dict[tuple[int, ...], int]:
            # The model cannot write a word without a token.
            tokens = {ids(text): node for node, text in texts}
            return {each: node for each, node in tokens.items() if tokenizer.unk_token_id not in each}

        opening, answers = graph.answers()
        return cls(len(graph.idx_to_symbol), known(graph.step_beginnings()), known(answers), len(ids(opening)) - 1)

    @property
    def all(self) -> list[tuple[int, ...]]:
        return [*self.steps, *self.answers]

    def distributions(self, log_probs: Mapping[tuple[int, ...], list[float]]) -> tuple[list[float], list[float]]:
        """Over the nodes, of the next step and of the answer, from the log probabilities of every token."""
        return self._over_nodes(self.steps, log_probs, 0), self._over_nodes(self.answers, log_probs, self.n_opening)

    def _over_nodes(
        self, nodes: Mapping[tuple[int, ...], int], log_probs: Mapping[tuple[int, ...], list[float]], n_given: int
    ) -> list[float]:
        found = [0.0] * self.n_nodes
        of_texts = {tokens: sum(log_probs[tokens][n_given:]) for tokens in nodes}
        for tokens, probability in exclusive_probabilities(of_texts).items():
            found[nodes[tokens]] += probability
        return found
