"""What is read in thoughts against values worked out by hand: norms, entropies, windows, next steps in graphs."""

from __future__ import annotations

import functools
import json
import math
import random
from dataclasses import asdict

import naive
import prosqa
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast

from coconut_ds import Coconut, LatentContext
from coconut_ds.analysis.inspection.averages import average_readings
from coconut_ds.analysis.inspection.continuations import Continuation, exclusive_probabilities, token_log_probs
from coconut_ds.analysis.inspection.graphs import graph_of
from coconut_ds.analysis.inspection.next_steps import among_nodes, next_steps
from coconut_ds.analysis.inspection.prosqa_graph import ProsqaGraph
from coconut_ds.analysis.inspection.readings import read
from coconut_ds.analysis.inspection.tables import question_tables
from coconut_ds.analysis.inspection.written_steps import WrittenStep, average_written, written_steps
from coconut_ds.data.batches import Tokens
from coconut_ds.data.records import row_of
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Question
from coconut_ds.inference.trained_model import TrainedModel, curriculum_of
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.scratch import word_tokenizer

SYMBOLIC = {
    "question": "n1 n2 | n1 n12 | n2 n0 | n21 n10 | ? n1 n0 n10",
    "steps": ["n1 n2", "n2 n0"],
    "answer": "n0",
    "idx_to_symbol": ["n1", "n2", "n12", "n0", "n21", "n10"],
    "edges": [[0, 1], [0, 2], [1, 3], [4, 5]],
    "root": 0,
    "target": 3,
    "neg_target": 5,
}
TEXT = {
    **SYMBOLIC,
    "question": "Al is a bo. Al is a bob. Every bo is a ab. Bo is a ba. Is Al a ab or ba?",
    "steps": ["Al is a bo.", "Every bo is a ab."],
    "answer": "Al is a ab.",
    "idx_to_symbol": ["Al", "bo", "bob", "ab", "Bo", "ba"],
}
EDGES = {**SYMBOLIC, "question": "n1>n2 n1>n12 n2>n0 n21>n10 ? n1 n0 n10", "steps": ["n1>n2", "n2>n0"]}
FORMS = {"symbolic": SYMBOLIC, "text": TEXT, "edges": EDGES}


def character_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """One token a character, so that every name has several, and some names begin others."""
    characters = sorted({*"# \n", *"".join(texts)})
    vocabulary = {token: number for number, token in enumerate(["<|pad|>", "<|endoftext|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def trained_on(tokenizer: PreTrainedTokenizerFast, context: LatentContext | None = None, **settings) -> TrainedModel:
    """A model with large random weights, as if trained to the stage of all thoughts."""
    torch.manual_seed(0)
    backbone = Backbone(tiny.backbone(settings.pop("family", "gpt2")), tokenizer)
    add_markers(backbone)
    tokens = Tokens.of("coconut", tokenizer)
    model = Coconut(
        backbone.model,
        latent_token_id=tokens.latent,
        start_latent_id=tokens.start_latent,
        end_latent_id=tokens.end_latent,
        eos_token_id=tokenizer.eos_token_id,
        latent_context=context,
    )
    values = {"method": "coconut", "c_thought": 1, "max_latent_stage": 2, "pad_latent_to_max": True}
    values |= {"curriculum": "forward", **settings}
    return TrainedModel(model.eval(), tokenizer, tokens, curriculum_of(values), stage=3)


def words_of(record: dict) -> PreTrainedTokenizerFast:
    return word_tokenizer([record["question"], *record["steps"], record["answer"]], n_positions=96)


class FixedLogits(torch.nn.Module):
    """An LM head that gives every state the same distribution: of each token its weight's share."""

    def __init__(self, n_tokens: int, weights: dict[int, float]):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(n_tokens, 1))
        self.logits = torch.full((n_tokens,), -torch.inf)
        for token, weight in weights.items():
            self.logits[token] = math.log(weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*states.shape[:-1], -1)


def fix_head(trained: TrainedModel, weights: dict[str, float]) -> None:
    ids = {trained.tokenizer(word, add_special_tokens=False)["input_ids"][0]: each for word, each in weights.items()}
    assert len(ids) == len(weights)
    trained.model.base_causallm.set_output_embeddings(FixedLogits(tiny.VOCABULARY, ids))


# Continuations


def naive_log_probs(trained: TrainedModel, prompt: list[int], tokens: tuple[int, ...]) -> list[float]:
    hidden, _ = naive.row_states(trained.model, [*prompt, *tokens], len(prompt))
    log_probs = trained.model.lm_head(hidden).log_softmax(dim=-1)
    return [float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_continuations_have_the_probabilities_of_a_model_that_runs_everything_again(family):
    trained = trained_on(character_tokenizer(SYMBOLIC["question"]), LatentContext((0.6, 0.3, 0.1)), family=family)
    prompts = trained.prompts(["n1 n2 |", "n1", "n1 n2 | n1 n0 | ?"], [2, 0, 3]).inputs
    continuations = [
        Continuation(*each)
        for each in [
            (0, 0, (5, 6, 7)),
            (0, 1, (5, 6, 8)),
            (1, 0, (9, 3)),
            (2, 3, (7, 8)),
            (2, 2, (7, 8)),
            (1, 0, (5, 6, 7, 8)),
            (1, 0, (5, 6, 9)),
            (2, 0, (10, 4)),
            (0, 1, (5, 7)),
        ]
    ]
    mask = prompts["attention_mask"]
    found = token_log_probs(trained.model, prompts["input_ids"], mask, continuations, rows_at_once=2)
    for each in continuations:
        prompt = prompts["input_ids"][each.row][mask[each.row].bool()].tolist()
        prompt = [*prompt[: len(prompt) - each.n_dropped], each.tokens[0]]
        assert found[each] == pytest.approx(naive_log_probs(trained, prompt, each.tokens[1:]), abs=2e-5)


class Transfers(TorchFunctionMode):
    """Counts what reads a tensor's values, which synchronises with a GPU."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("__float__", "__int__", "__bool__", "item", "tolist")
        return function(*args, **(kwargs or {}))


def test_probabilities_are_transferred_once_per_text_not_per_token():
    trained = trained_on(character_tokenizer(SYMBOLIC["question"]))
    prompts = trained.prompts(["n1 n2 |"], [2]).inputs
    counts = []
    for length in (2, 6):
        with Transfers() as transfers:
            wanted = [Continuation(0, 0, (5, *range(6, 6 + length), last)) for last in (12, 13, 14)]
            token_log_probs(trained.model, prompts["input_ids"], prompts["attention_mask"], wanted, rows_at_once=2)
        counts.append(transfers.count)
    assert counts[0] == counts[1]


def test_a_name_that_begins_others_keeps_what_is_left_of_them():
    starts = {(1,): 0.8, (1, 2): 0.5, (1, 3): 0.1, (1, 2, 4): 0.2, (1, 2, 4, 5): 0.15, (6,): 0.1}
    found = exclusive_probabilities({tokens: math.log(value) for tokens, value in starts.items()})
    expected = {(1,): 0.2, (1, 2): 0.3, (1, 3): 0.1, (1, 2, 4): 0.05, (1, 2, 4, 5): 0.15, (6,): 0.1}
    assert found == pytest.approx(expected)


# Graphs


def test_distances_are_shortest_paths_from_the_root():
    graph = ProsqaGraph.model_validate({**SYMBOLIC, "edges": [[0, 1], [1, 2], [0, 2], [2, 3], [4, 0]]})
    assert graph.distances == {0: 0, 1: 1, 2: 1, 3: 2}
    assert graph.leads_to_target == {0, 1, 2, 3, 4}


def test_steps_begin_as_the_form_writes_them():
    graph = ProsqaGraph.model_validate(TEXT)
    assert graph.step_beginnings()[:4] == [(0, "Al"), (1, "Every bo"), (2, "Every bob"), (3, "Every ab")]
    assert graph.answers()[1][1] == (1, "### Al is a bo")
    assert ProsqaGraph.model_validate(SYMBOLIC).step_beginnings()[2] == (2, "n12")
    edges = ProsqaGraph.model_validate(EDGES)
    assert (edges.form, len(edges.step_beginnings())) == ("edges", 30)
    assert edges.step_beginnings()[0] == (0, "n1>n2")
    assert edges.answers()[1][3] == (3, "### n0")


@pytest.mark.parametrize("form", prosqa.FORMS)
def test_every_step_of_a_generated_record_begins_with_a_text_of_its_node(form):
    for record in prosqa.generate(5, "0", n_nodes=9, min_steps=2, max_steps=3, form=form):
        graph = graph_of(record)
        for distance, step in enumerate(record["steps"]):
            nodes = {node for node, text in graph.step_beginnings() if step.startswith(text)}
            assert [graph.distances[node] for node in nodes if node in graph.distances] == [distance]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"edges": None}, "edges: Input should be a valid tuple"),
        ({"target": 9}, "names no node 9 in idx_to_symbol"),
        ({"root": "x"}, "root: Input should be a valid integer"),
    ],
)
def test_a_record_whose_graph_is_none_says_why(changes, reason):
    assert str(graph_of({**SYMBOLIC, **changes})).startswith(reason)
    assert graph_of({"question": "1 + 1?"}) == "has no key idx_to_symbol"


@pytest.mark.shared
def test_every_published_record_has_its_graph(shared):
    records = json.loads((shared / "datasets" / "prosqa_valid.json").read_text())
    assert [graph for graph in map(graph_of, records) if isinstance(graph, str)] == []
    assert len(records) == 300


@pytest.mark.parametrize("form", prosqa.FORMS)
def test_spaces_and_newlines_make_no_other_graph(form):
    """Evaluation leaves them out as well."""
    for record in prosqa.generate(20, "graph", form=form):
        question, answer = "  " + record["question"].replace(" ", "  ") + " \n", record["answer"] + " "
        assert isinstance(graph_of(record | {"question": question, "answer": answer}), ProsqaGraph)


@pytest.mark.parametrize("shape", [{}, {"n_nodes": 40, "min_steps": 7, "max_steps": 9}, {"mean_parents": 2.5}])
@pytest.mark.parametrize("form", prosqa.FORMS)
def test_every_generated_record_has_its_graph_whatever_the_order_of_facts(form, shape):
    draw = random.Random(0)
    for record in prosqa.generate(50, "graph", form=form, **shape):
        assert isinstance(graph_of(record), ProsqaGraph)
        doubled = [*record["edges"], record["edges"][0]]
        draw.shuffle(doubled)
        assert isinstance(graph_of({**record, "edges": doubled}), ProsqaGraph)


OTHER_GRAPHS = {
    "an edge reversed": ({"edges": [[1, 0], [0, 2], [1, 3], [4, 5]]}, "edges: '"),
    "all edges reversed": ({"edges": [[1, 0], [2, 0], [3, 1], [5, 4]]}, "edges: '"),
    "an edge missing": ({"edges": [[0, 1], [1, 3], [4, 5]]}, "edges: lack '"),
    "an edge added": ({"edges": [[0, 1], [0, 2], [1, 3], [4, 5], [2, 3]]}, "edges: '"),
    "no edges": ({"edges": []}, "edges: lack '"),
    "names in another order": ({"idx_to_symbol": ["n2", "n1", "n12", "n0", "n21", "n10"]}, "root, target, neg_target:"),
    "names of others in another order": ({"idx_to_symbol": ["n1", "n12", "n2", "n0", "n21", "n10"]}, "edges: '"),
    "a name twice": ({"idx_to_symbol": ["n1", "n2", "n2", "n0", "n21", "n10"]}, "idx_to_symbol: 'n2' names two"),
    "another root": ({"root": 1}, "root, target, neg_target: the question does not end with '"),
    "another target": ({"target": 2}, "root, target, neg_target: the question does not end with '"),
    "another wrong option": ({"neg_target": 2}, "root, target, neg_target: the question does not end with '"),
    "options exchanged": ({"target": 5, "neg_target": 3}, "target: 'n10' cannot be reached from the root 'n1'"),
    "another answer": ({"answer": "n10"}, "target: the answer is 'n10', the graph's "),
}


@pytest.mark.parametrize("change", OTHER_GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_that_is_not_the_questions_is_refused(form, change):
    changes, reason = OTHER_GRAPHS[change]
    names = dict(zip(SYMBOLIC["idx_to_symbol"], FORMS[form]["idx_to_symbol"]))
    if "idx_to_symbol" in changes:
        changes = {"idx_to_symbol": [names[name] for name in changes["idx_to_symbol"]]}
    for name, own in sorted(names.items(), reverse=True):
        reason = reason.replace(f"'{name}'", f"'{own}'")
    if change == "another answer":
        reason = "target: the answer is 'n10', the graph's "
    assert str(graph_of({**FORMS[form], **changes})).startswith(reason)


@pytest.mark.parametrize(
    "question", ["How many pens are there?", "2 + 3 = 5", "", "? n1 n0 n10", "n1 n2 | n1 n12 | n2 n0 | n21 n10 |"]
)
def test_a_question_that_writes_no_graph_has_none(question):
    assert isinstance(graph_of({**SYMBOLIC, "question": question}), str)


def test_options_stand_in_either_order():
    for form, last in (("symbolic", "n10 n0"), ("edges", "n10 n0"), ("text", "ba or ab?")):
        start = FORMS[form]["question"].removesuffix({"text": "ab or ba?"}.get(form, "n0 n10"))
        assert isinstance(graph_of({**FORMS[form], "question": start + last}), ProsqaGraph)


# Next steps


def test_masses_are_sums_over_sets_of_nodes():
    graph = ProsqaGraph.model_validate(SYMBOLIC)
    found = graph.masses([0.1, 0.2, 0.05, 0.25, 0.08, 0.02], 1)
    assert found["reachable"] == pytest.approx(0.6)
    assert found["frontier"] == pytest.approx(0.25)  # n2 and n12
    assert found["leading"] == pytest.approx(0.2)  # only n2 leads to n0
    assert (found["target"], found["distractor"]) == (0.25, 0.02)
    assert found["unreachable"] == pytest.approx(0.1)
    assert found["no_node"] == pytest.approx(0.3)
    assert among_nodes([0.1, 0.3]) == pytest.approx([0.25, 0.75])


def test_words_that_are_edges_count_for_the_node_they_start_from():
    trained = trained_on(words_of(EDGES))
    fix_head(trained, {"n1>n2": 3, "n1>n12": 1, "n2>n0": 2, "n21>n10": 1, "###": 2, "n0": 0.6, "n10": 0.4})
    steps = next_steps(trained, [ProsqaGraph.model_validate(EDGES)], [2], batch_size=8)[0]
    assert [step.n_thoughts for step in steps] == [0, 1, 2]
    for step in steps:
        assert step.step == pytest.approx([0.4, 0.2, 0, 0, 0.1, 0])
        assert step.answer == pytest.approx([0, 0, 0, 0.06, 0, 0.04])  # the word "n1" has no token of its own here


def test_a_sentence_counts_for_its_subject_with_every_token_of_it():
    trained = trained_on(words_of(TEXT))
    fix_head(trained, {"Al": 1, "Every": 4, "bo": 2, "bob": 1, "ab": 1, "###": 1})
    step = next_steps(trained, [ProsqaGraph.model_validate(TEXT)], [0], batch_size=8)[0][0]
    assert step.step == pytest.approx([0.1, 0.4 * 0.2, 0.4 * 0.1, 0.4 * 0.1, 0, 0])
    assert step.answer == pytest.approx([0.1, 0.2, 0.1, 0.1, 0, 0])  # "### Al is a" is given


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_next_steps_are_products_over_the_tokens_of_names_also_where_names_begin_others(form):
    record = FORMS[form]
    trained = trained_on(character_tokenizer(record["question"], record["answer"]), LatentContext((0.6, 0.4)))
    graph = ProsqaGraph.model_validate(record)
    # Another question beside it, shorter and of fewer thoughts, so that rows are padded.
    other = graph.model_copy(update={"question": record["question"][-14:]})
    found = next_steps(trained, [other, graph], [1, 2], batch_size=5)
    assert [len(steps) for steps in found] == [2, 3]
    opening, _ = graph.answers()
    for step in found[1]:
        prompt = trained.prompts([graph.question], [step.n_thoughts]).inputs["input_ids"][0].tolist()

        @functools.cache
        def starts_with(text: str, given: str = "", prompt: list[int] = prompt) -> float:
            ids, n_given = (trained.tokenizer(each)["input_ids"] for each in (text, given))
            return math.exp(sum(naive_log_probs(trained, prompt, tuple(ids))[len(n_given) :]))

        texts = {text: node for node, text in graph.step_beginnings()}
        expected = [0.0] * 6
        for text, node in texts.items():
            longer = [each for each in texts if each.startswith(text) and len(each) == len(text) + 1]
            expected[node] += starts_with(text) - sum(map(starts_with, longer))
        assert step.step == pytest.approx(expected, rel=1e-3)
        answers = [starts_with(f"{opening} {name}", opening) for name in graph.idx_to_symbol]
        for node, name in enumerate(graph.idx_to_symbol):
            longer = [each for each in graph.idx_to_symbol if each.startswith(name) and each != name]
            answers[node] -= sum(starts_with(f"{opening} {each}", opening) for each in longer)
        assert step.answer == pytest.approx(answers, rel=1e-3)


# Readings

PLAIN = {"question": "n1 n2 | ? n1", "steps": ["n1 n2"], "answer": "n0"}
SHORT = {"question": "n1", "steps": ["n1 n2"], "answer": "n0"}


def readings(trained: TrainedModel, records: list[dict], n_thoughts: list[int], top_k: int = 3):
    questions = [Question.of(record, place, count) for place, (record, count) in enumerate(zip(records, n_thoughts))]
    answered = trained.ask(questions, 4)
    return read(trained, answered, answered.thoughts(), top_k)


@torch.no_grad()
def test_norms_are_those_of_what_was_fed_and_of_the_tokens_of_the_question():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.6, 0.3, 0.1), norm="rms"))
    for found, record in zip(readings(trained, [PLAIN, SHORT], [3, 2]), [PLAIN, SHORT]):
        ids = trained.prompts([record["question"]], [len(found.thoughts)]).inputs["input_ids"][0].tolist()
        _, embeds = naive.row_states(trained.model, ids)
        norms = embeds.norm(dim=1)
        first = ids.index(trained.tokens.latent)
        assert [each.norm for each in found.thoughts] == pytest.approx(norms[first:-1].tolist(), rel=1e-5)
        question = norms[: first - 1]  # the marker stands before the first thought
        expected = {"mean": float(question.mean()), "min": float(question.min()), "max": float(question.max())}
        assert found.embedding_norms == pytest.approx(expected, rel=1e-5)


def test_entropy_is_in_bits_and_the_tokens_are_the_most_probable_ones():
    trained = trained_on(words_of(SYMBOLIC))
    fix_head(trained, {"n1": 4, "n2": 2, "n0": 1, "n10": 1})
    (found,) = readings(trained, [PLAIN], [1], top_k=2)
    assert found.thoughts[0].entropy_bits == pytest.approx(1.75)
    assert [token.strip() for token, _ in found.thoughts[0].top] == ["n1", "n2"]
    assert [share for _, share in found.thoughts[0].top] == pytest.approx([0.5, 0.25])


@torch.no_grad()
def test_the_tokens_are_what_the_lm_head_reads_in_the_average_of_the_states():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.6, 0.4)))
    (found,) = readings(trained, [PLAIN], [2])
    ids = trained.prompts([PLAIN["question"]], [2]).inputs["input_ids"][0].tolist()
    hidden, _ = naive.row_states(trained.model, ids)
    second = ids.index(trained.tokens.latent) + 1
    expected = trained.model.lm_head(0.6 * hidden[second - 1] + 0.4 * hidden[second - 2]).softmax(dim=-1)
    assert [share for _, share in found.thoughts[1].top] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-4)


def window(found, thought: int) -> dict[str, float]:
    return {name.strip(" "): round(share, 4) for name, share in found.thoughts[thought].window}


def test_a_window_names_the_states_it_averages_also_where_rows_have_fewer():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.5, 0.3, 0.15, 0.05)))
    long, short = readings(trained, [PLAIN, SHORT], [3, 2])
    assert window(long, 0) == {"<|start-latent|>": 0.5, "\n": 0.3, "n1": 0.15, "?": 0.05}
    assert window(long, 2) == {"thought 2": 0.5, "thought 1": 0.3, "<|start-latent|>": 0.15, "\n": 0.05}
    # "n1", newline and marker are all there is before it: 0.05 of the window has no state.
    assert window(short, 0) == {"<|start-latent|>": 0.5263, "\n": 0.3158, "n1": 0.1579}
    assert window(short, 1) == {"thought 1": 0.5, "<|start-latent|>": 0.3, "\n": 0.15, "n1": 0.05}


def test_a_window_of_the_last_pass_holds_one_state_after_the_first_thought():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.1, 0.3, 0.6), scope="last_pass"))
    long, short = readings(trained, [PLAIN, SHORT], [2, 1])
    assert window(long, 0) == {"<|start-latent|>": 0.1, "\n": 0.3, "n1": 0.6}
    assert window(long, 1) == {"thought 1": 1.0}
    assert window(short, 0) == {"<|start-latent|>": 0.1, "\n": 0.3, "n1": 0.6}


def test_a_state_whose_weight_is_0_keeps_its_place_in_the_window_and_is_not_printed():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.6, 0.0, 0.4)))
    found = readings(trained, [PLAIN, SHORT], [1, 1])
    assert [share for _, share in found[0].thoughts[0].window] == pytest.approx([0.6, 0, 0.4])
    shares = [share["mean"] for share in average_readings(found)["thoughts"][0]["window"]]
    assert shares == pytest.approx([0.6, 0, 0.4])
    assert "window:  <|start-latent|> 60.0%, n1 40.0%" in question_tables({**asdict(found[0]), "why_no_graph": "no"})


@torch.no_grad()
def test_answers_are_the_greedy_ones():
    trained = trained_on(words_of(SYMBOLIC), LatentContext((0.6, 0.4)))
    questions = [Question.of(record, n_thoughts=2) for record in (PLAIN, SHORT)]
    tokens = trained.ask(questions, 4).decoded.tokens
    for row, question in zip(tokens.tolist(), questions):
        prompt = trained.prompts([question.text], [2]).inputs["input_ids"][0].tolist()
        expected = naive.greedy(trained.model, prompt, 4)
        assert row[: len(expected)] == expected


# Written steps


def test_written_steps_are_compared_with_those_their_thoughts_stand_for(monkeypatch):
    record = {"question": "a b", "steps": ["c d", "e", "f"], "answer": "g"}
    trained = trained_on(word_tokenizer([record["question"], *record["steps"], "g"], n_positions=32), c_thought=2)
    ids = row_of(record, trained.tokenizer)
    end, (first, second, third) = trained.tokenizer.eos_token_id, ids["steps_ids"]
    # The second group of two stands for all that is left; what follows an end does not count.
    written = [[*first, end, 1, 1], [*second, end, *third], [*first, *first], [*first, end]]
    given = []

    def fake(model, thoughts, n_tokens):
        given.append((thoughts, n_tokens))
        chunk, written[: len(thoughts)] = written[: len(thoughts)], []
        return torch.tensor([(each + [0] * n_tokens)[:n_tokens] for each in chunk])

    monkeypatch.setattr("coconut_ds.analysis.inspection.written_steps.write_steps", fake)
    fed = [torch.arange(4.0)[:, None], torch.arange(4.0, 8.0)[:, None]]
    one, other = written_steps(trained, [record, record], fed, batch_size=3)
    assert torch.cat([thoughts for thoughts, _ in given]).flatten(1).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert one == [WrittenStep(1, "c d", "c d", True), WrittenStep(2, "e\nf", "e", False)]
    assert [each.correct for each in other] == [False, False]
    assert given[0][1] == len([*second, *third, end])
    averaged = average_written([one, other, one[:1]])
    assert [(each["n_questions"], each["correct"]["mean"]) for each in averaged] == [(3, pytest.approx(2 / 3)), (2, 0)]


def test_a_step_beyond_the_models_positions_is_refused():
    record = {"question": "a", "steps": [" ".join("b" * 300)], "answer": "g"}
    trained = trained_on(word_tokenizer(["a b g"], n_positions=32))
    with pytest.raises(InputError, match="--written-steps: 302 tokens after 1 thoughts"):
        written_steps(trained, [record], [torch.zeros(1, 1)], batch_size=1)
