"""The findings of an inspection, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coconut_ds.analysis.text_tables import Rows, aligned
from coconut_ds.runs.predictions import cut_warning
from coconut_ds.runs.thought_use import Share, ThoughtUse

_MASSES = {
    "reachable": "reachable",
    "frontier": "at distance k",
    "leading": "leading to target",
    "target": "target",
    "distractor": "distractor",
    "unreachable": "unreachable",
    "no_node": "no node",
}
_OF_ANSWERS = ("target", "distractor", "no_node")
"""Of ProsQA, whose answers are one of two."""
_ABOUT_STEP = "Next step after k steps' worth of thoughts: probability that it starts from"
_ABOUT_AMONG_NODES = "The same, given that it starts from some node; below each k the share of nodes of that kind"
_ABOUT_ANSWER = "Answer after k steps' worth of thoughts, begun for the model: probability that it names"


def question_tables(found: dict[str, Any], misses_picture: bool = False) -> str:
    """One question: the answer, its thoughts, the next steps.

    With `misses_picture` the line that explains why there is no graph adds that no picture was drawn.
    """
    cut = f", cut off after {found['n_new_tokens']} tokens" if found["cut"] else ""
    verdict = f"{'right' if found['correct'] else 'wrong'}{cut}"
    head = aligned(
        [
            ["question", found["question"]],
            ["expected", found["expected"]],
            ["given", f"{found['given'] or '(nothing)'} ({verdict})"],
        ]
    )
    steps = _next_step_tables(found, _share, "; so no picture was drawn" if misses_picture else "")
    return "\n\n".join([_flush_left(head), _thought_lines(found), *steps, *_written_table(found)])


def _flush_left(text: str) -> str:
    return "\n".join("  ".join([line[:8], line[8:].lstrip()]) for line in text.splitlines())


def _thought_lines(found: dict[str, Any]) -> str:
    norms = found["embedding_norms"]
    lines = [
        "Norms are L2 of the vectors fed in; token embeddings of the question have "
        f"{norms['mean']:.3g} on average, {norms['min']:.3g} to {norms['max']:.3g}. Entropies are in bits."
    ]
    for number, thought in enumerate(found["thoughts"], start=1):
        top = ", ".join(f"{_visible(token)} {share:.1%}" for token, share in thought["top"])
        window = ", ".join(f"{_visible(state)} {share:.1%}" for state, share in thought["window"] if share)
        lines += [
            f"thought {number}: norm {thought['norm']:.3g}, entropy {thought['entropy_bits']:.2f}",
            f"  LM head: {top}",
            f"  window:  {window}",
        ]
    return "\n".join(lines)


def _visible(token: str) -> str:
    shown = token.strip(" ")
    return shown if shown.isprintable() and shown and "," not in shown else repr(token)


def file_tables(found: dict[str, Any]) -> str:
    """A whole file: averages by thought and by k, interventions."""
    accuracy, norm = found["accuracy"], found["embedding_norm"]
    parts = [
        f"{found['n_questions']} questions, accuracy {_percent(accuracy)}; "
        f"token embeddings of the questions have a norm of {_number(norm)}.\n"
        "In brackets 95% intervals: percentile bootstrap over questions, 10,000 draws."
        f"{_cut_line(found)}",
        aligned(_thought_rows(found["thoughts"])),
        *_next_step_tables(found, _percent),
    ]
    if found.get("interventions"):
        parts.append(_intervention_table(found["interventions"]))
    parts += _written_table(found)
    return "\n\n".join(parts)


def _cut_line(found: dict[str, Any]) -> str:
    n_cut, limit = found["n_cut"], found["max_new_tokens"]
    return f"\nwarning: {cut_warning(n_cut, found['n_questions'], limit, '--max-new-tokens')}" if n_cut else ""


def _thought_rows(thoughts: Sequence[dict[str, Any]]) -> Rows:
    reach = max(len(each["window"]) for each in thoughts)
    shares = [f"state -{back}" for back in range(1, reach + 1)]
    rows = [["thought", "questions", "norm", "entropy (bits)", "top probability", *shares]]
    for each in thoughts:
        window = [_percent(share) for share in each["window"]]
        figures = [_number(each["norm"]), _number(each["entropy_bits"]), _percent(each["top_probability"])]
        missing = [""] * (reach - len(window))
        rows.append([str(each["thought"]), str(each["n_questions"]), *figures, *window, *missing])
    return rows


def _next_step_tables(found: dict[str, Any], cell: Callable[[Any], str], consequence: str = "") -> list[str]:
    if found["why_no_graph"]:
        return [f"No next steps, because there is no graph: {found['why_no_graph']}{consequence}."]
    steps = found["next_steps"]
    every = list(steps[0]["step_masses"])
    of_answers = _OF_ANSWERS if "target" in every else every
    return [
        f"{_ABOUT_STEP}\n{_mass_table(steps, 'step_masses', every, cell)}",
        f"{_ABOUT_AMONG_NODES}\n{_mass_table(steps, 'step_among_nodes_masses', every[:-1], cell, with_chance=True)}",
        f"{_ABOUT_ANSWER}\n{_mass_table(steps, 'answer_masses', of_answers, cell)}",
    ]


def _mass_table(
    steps: Sequence[dict[str, Any]],
    key: str,
    names: Sequence[str],
    cell: Callable[[Any], str],
    with_chance: bool = False,
) -> str:
    averaged = "n_questions" in steps[0]
    rows = [["k", *["questions"] * averaged, *(_mass_name(name) for name in names)]]
    for after in steps:
        counts = [str(after["n_questions"])] if averaged else []
        rows.append([str(after["n_replaced"]), *counts, *(cell(after[key][name]) for name in names)])
        if with_chance:
            shares = (_mean(after["node_shares"][name]) for name in names)
            rows.append(["  of the nodes", *[""] * averaged, *shares])
    return aligned(rows)


def _mass_name(name: str) -> str:
    """Of ProsQA's sets of nodes, or `after_2`, the node of a walk after two edges."""
    return _MASSES.get(name, f"node {name.replace('_', ' ')}")


def _mean(value: Any) -> str:
    return f"{value['mean'] if isinstance(value, dict) else value:.1%}"


def _intervention_table(outcomes: Sequence[dict[str, Any]]) -> str:
    names = {"n_lost": "lost", "n_gained": "gained", "n_changed": "other answer"}
    if any(each["n_cut"] for each in outcomes):
        names["n_cut"] = "cut off"
    rows = [["thought, fed instead", "questions", "accuracy", "change", "95% interval", *names.values()]]
    for each in outcomes:
        which = "all" if each["thought"] is None else str(each["thought"])
        low, high = (100 * end for end in each["interval"])
        counts = [str(each[key]) for key in names]
        change = f"{100 * each['change']:+.1f}"
        name = f"{which}, {_INSTEAD[each['by']]}"
        rows.append(
            [name, str(each["n_replaced"]), f"{each['accuracy']:.1%}", change, f"{low:+.1f} to {high:+.1f}", *counts]
        )
    return (
        "Interventions, over the questions that have the thought: accuracy, its change in points, paired bootstrap;\n"
        "answers right before and wrong after (lost), wrong before and right after (gained), other than before\n"
        + aligned(rows)
    )


def _written_table(found: dict[str, Any]) -> list[str]:
    if "written_steps" not in found:
        return []
    head = f"Written by the {found['writer']} from the thoughts of each step alone"
    steps = found["written_steps"]
    if "n_questions" in found:
        rows = [[str(each["group"]), str(each["n_questions"]), _percent(each["correct"])] for each in steps]
        return [f"{head}: share that is the step\n{aligned([['step', 'questions', 'right'], *rows])}"]
    rows = [
        [str(each["group"]), each["written"] or "(nothing)", each["expected"], "right" if each["correct"] else "wrong"]
        for each in steps
    ]
    return [f"{head}\n{aligned([['step', 'written', 'expected', ''], *rows])}"]


def stage_table(found: ThoughtUse) -> str:
    """Accuracy by number of thoughts with own thoughts and exchanged ones, and the last row in one sentence."""
    rows = [["thoughts", "after epoch", "own thoughts", "95% interval", "another question's", "95% interval"]]
    for each in found.stages:
        shares = (_interval(share) if share else ["", ""] for share in (each.own, each.exchanged))
        rows.append([str(each.n_thoughts), str(each.epoch), *(cell for cells in shares for cell in cells)])
    return f"{aligned(rows)}\n\n{found.sentence}"


def _interval(share: Share) -> list[str]:
    return [f"{share.share:.1%}", f"{100 * share.low:.1f} to {100 * share.high:.1f}"]


_INSTEAD = {"zero": "zero", "mean": "mean thought", "other": "another question's"}


def _share(value: float) -> str:
    return f"{value:.1%}"


def _percent(average: dict[str, float]) -> str:
    return f"{average['mean']:.1%} [{100 * average['low']:.1f}, {100 * average['high']:.1f}]"


def _number(average: dict[str, float]) -> str:
    return f"{average['mean']:.3g} [{average['low']:.3g}, {average['high']:.3g}]"
