"""The plots of a run's `thoughts.json` for its report: the exchange of thoughts, and what they hold."""

from __future__ import annotations

from functools import partial

from coconut_ds.analysis.plots.curves import Runs
from coconut_ds.analysis.plots.thoughts import draw_question
from coconut_ds.analysis.plots.training import Picture
from coconut_ds.analysis.plots.walks import draw_exchange, draw_heat
from coconut_ds.runs.thought_use import ThoughtUse


def thought_pictures(runs: Runs) -> list[Picture]:
    """The plots of every run that has been inspected by stage; none for others."""
    found = []
    for index, (name, run) in enumerate(runs.items()):
        if run.thought_use:
            of_run = f", {name}" if len(runs) > 1 else ""
            found += _pictures(run.thought_use, "" if len(runs) == 1 else f"_{index + 1}", of_run)
    return found


def _pictures(use: ThoughtUse, ending: str, of_run: str) -> list[Picture]:
    exchange = (
        f"Of {use.n_questions:,} questions of {use.data}; in the last stage the {use.sentence.partition(': ')[2]}. An "
        "answer that does not depend on the thoughts stays the same. Bars: 95% intervals."
    )
    found = [
        Picture(
            f"exchange{ending}",
            f"Accuracy with own and with exchanged thoughts{of_run}",
            exchange,
            partial(draw_exchange, use.stages),
        )
    ]
    graph, question = use.question.get("graph"), f"Question: {use.question['question']}"
    if not graph:
        return found
    is_walk = "walk" in graph
    about = _ABOUT_WALK if is_walk else _ABOUT_GRAPH
    title = f"One question, thought by thought{of_run}"
    found.append(Picture(f"question{ending}", title, f"{question}. {about}", partial(draw_question, use.question)))
    if is_walk:
        about = f"Means over {use.n_questions:,} questions. {_ABOUT_HEAT}"
        found.append(
            Picture(f"walk{ending}", f"Where it is after each thought{of_run}", about, partial(draw_heat, use.file))
        )
    return found


_ABOUT_GRAPH = "Probability that the next step starts from each node, after 0, 1, 2 .. thoughts."
_ABOUT_WALK = (
    "Colour: the probability that the next step starts from the node, after the number of thoughts above the graph; in "
    "the last graph, that the answer is the node. Dark ring: start; green ring: end; blue arrows: the steps replaced."
)
_ABOUT_HEAT = (
    "The probability of each node of the walk, among all nodes, to be the start of the next step, in the last row "
    "to be the answer. A diagonal means that the thoughts of j steps hold the node after j edges."
)
