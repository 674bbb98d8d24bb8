"""Inspection of the hops task: the walk, the node a model goes on from after each thought, the plots of both."""

from __future__ import annotations

import hops
import pytest
from matplotlib.figure import Figure
from test_inspection import fix_head, trained_on, words_of

from coconut_ds.analysis.inspection.averages import average_next_steps, describe
from coconut_ds.analysis.inspection.graphs import graph_of
from coconut_ds.analysis.inspection.hops_walk import HopsWalk
from coconut_ds.analysis.inspection.next_steps import next_steps
from coconut_ds.analysis.plots.canvas import DARK, LIGHT
from coconut_ds.analysis.plots.walks import draw_heat, draw_walk, on_circle, walk_heat

EDGES = {"question": "n1>n2 n2>n12 n12>n1 ? n2", "steps": ["n2>n12", "n12>n1"], "answer": "n1"}
SYMBOLIC = {"question": "n1 n2 | n2 n12 | n12 n1 | ? n2", "steps": ["n2 n12", "n12 n1"], "answer": "n1"}
PAIRS = {"question": "n1-n2>n1 n2-n1>n1 n1-n1>n2 n2-n2>n2 ? n1 n2", "steps": ["n1-n2>n1", "n2-n1>n1"], "answer": "n1"}
FORMS = {"edges": EDGES, "symbolic": SYMBOLIC, "pairs": PAIRS}


def walk_of(record: dict) -> HopsWalk:
    walk = graph_of(record)
    assert isinstance(walk, HopsWalk), walk
    return walk


def test_the_walk_is_that_of_the_steps():
    for record in (EDGES, SYMBOLIC):
        walk = walk_of(record)
        assert [walk.idx_to_symbol[node] for node in walk.walk] == ["n2", "n12", "n1"]
        assert walk.order == 1
    pairs = walk_of(PAIRS)
    assert [pairs.idx_to_symbol[node] for node in pairs.walk] == ["n2", "n1", "n1"]
    assert pairs.order == 2
    assert pairs.shown()["edges"] == ((1, 0), (0, 0)), "of pairs only the walk's"


@pytest.mark.parametrize(
    "shape",
    [
        hops.Shape(),
        hops.Shape(form="symbolic", start="first"),
        hops.Shape(n_nodes=4, order=2, form="symbolic", n_symbols=4),
        hops.Shape(n_nodes=4, order=2, hops=(2, 3), n_symbols=4),
        hops.Shape(graph="permutation"),
    ],
    ids=str,
)
def test_every_generated_question_has_its_walk(shape):
    for record in hops.generate(20, "walk", shape):
        walk = walk_of(record)
        assert len(walk.walk) == len(record["steps"]) + 1
        assert walk.idx_to_symbol[walk.walk[-1]] == record["answer"]
        assert len(walk.facts) == shape.n_nodes**shape.order


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": []}, "has no walk: needs a question"),
        ({"steps": ["n2>n12", "n1>n2"]}, "steps: 'n1 n2' does not follow 'n2 n12'"),
        ({"steps": ["n12>n1"]}, "steps: 'n12 n1' does not follow 'n2'"),
        ({"steps": ["n2>n1"]}, "steps: 'n2>n1' is not in the question"),
        ({"steps": ["n2 n12 n1"]}, "has no walk: facts and steps"),
        ({"answer": "n12"}, "answer: 'n12' is not 'n1'"),
    ],
)
def test_a_record_without_a_walk_says_why(changes, reason):
    assert str(graph_of({**EDGES, **changes})).startswith(reason)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_counts_for_the_node_reached_before_it(form):
    record = FORMS[form]
    trained = trained_on(words_of(record))
    heads = {
        "edges": {"n2>n12": 3, "n1>n2": 1, "###": 2, "n1": 4},
        "symbolic": {"n2": 3, "n1": 1, "###": 6},
        "pairs": {"n1-n2>n1": 3, "n2-n1>n1": 1, "###": 2, "n1": 4},
    }
    fix_head(trained, heads[form])
    walk = walk_of(record)
    (steps,) = next_steps(trained, [walk], [2], batch_size=8)
    assert [step.n_thoughts for step in steps] == [0, 1, 2]
    for step in steps:
        shares = dict(zip(walk.idx_to_symbol, step.step))
        assert shares["n2"] == pytest.approx(0.3)
        assert shares["n1"] == pytest.approx(0.1)
        answers = dict(zip(walk.idx_to_symbol, step.answer))
        assert answers["n1"] == pytest.approx(0.1 if form == "symbolic" else 0.4)
        masses = describe(walk, step)["step_masses"]
        assert masses["after_0"] == pytest.approx(0.3)
        assert masses["after_2"] == pytest.approx(0.1)
        assert masses["no_node"] == pytest.approx(0.6)


def described(record: dict) -> dict:
    """What an inspection of the question writes, by a model that always next step from n2 and answers n1."""
    trained = trained_on(words_of(record))
    fix_head(trained, {"n2>n12": 3, "###": 1, "n1": 1})
    walk = walk_of(record)
    (steps,) = next_steps(trained, [walk], [2], batch_size=8)
    averages = average_next_steps([walk, walk], [steps, steps])
    return {"graph": walk.shown(), "next_steps": [describe(walk, step) for step in steps], "file": averages}


def test_the_heat_map_reads_steps_and_at_the_end_the_answer():
    shares, kinds = walk_heat(described(EDGES)["file"])
    assert kinds == ["step", "step", "answer"]
    assert shares == [pytest.approx([1, 0, 0]), pytest.approx([1, 0, 0]), pytest.approx([0, 0, 1])]


def test_walks_of_different_lengths_share_the_masses_of_the_shorter():
    record = {**EDGES, "steps": EDGES["steps"][:1], "answer": "n12"}
    trained = trained_on(words_of(EDGES))
    fix_head(trained, {"n2>n12": 1})
    walks = [walk_of(EDGES), walk_of(record)]
    steps = next_steps(trained, walks, [2, 1], batch_size=8)
    averaged = average_next_steps(walks, steps)
    assert [after["n_questions"] for after in averaged] == [2, 2, 1]
    assert [list(after["step_masses"]) for after in averaged[::2]] == [
        ["after_0", "after_1", "no_node"],
        ["after_0", "after_1", "after_2", "no_node"],
    ]


def test_nodes_stand_on_a_circle_in_the_order_of_the_walk():
    places = on_circle(walk_of(EDGES).shown())
    assert len(places) == 3
    assert places[1] == pytest.approx((0, 1)), "the start is at the top"
    assert places[2][0] > 0 > places[0][0], "and the walk goes clockwise"


def test_both_plots_are_drawn_for_light_and_dark_pages():
    found = described(EDGES)
    for theme in (LIGHT, DARK):
        assert isinstance(draw_walk(found, theme), Figure)
        assert isinstance(draw_heat({"next_steps": found["file"]}, theme), Figure)
    titles = [axes.get_title() for axes in draw_walk(found).axes]
    assert titles == [
        "0 thoughts: next step from n2 100%",
        "1 thought: next step from n2 100%",
        "2 thoughts: answer n1 100%",
    ]
