"""A comparison as text or GitHub markdown: accuracies, by number of steps, differences, McNemar tests, notes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from coconut_ds.analysis.text_tables import Rows, aligned


def report(comparison: dict[str, Any], markdown: bool = False) -> str:
    """The tables and notes as text, or as GitHub markdown."""
    sets = ", ".join(dict.fromkeys(group["predictions"] for group in comparison["groups"]))
    parts = [f"{comparison['examples']} questions, predictions {sets}"]
    parts += [aligned(rows, markdown) for rows in tables(comparison).values()]
    parts.append("\n".join(f"- {note}" for note in comparison["notes"]))
    return "\n\n".join(parts)


def tables(comparison: dict[str, Any]) -> dict[str, Rows]:
    """The tables that have rows, by a name for each; the first row has the titles."""
    groups, pairs, solved = comparison["groups"], comparison["pairs"], comparison.get("solved")
    found = {
        "accuracy": _group_table(groups),
        "accuracy_by_steps": _steps_table(groups),
        "differences": _difference_table(pairs),
        "mcnemar": _mcnemar_table(pairs),
    }
    if solved:
        found |= {"solved": _solved_table(solved), "solved_tests": _solved_tests_table(solved)}
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def write_csv(comparison: dict[str, Any], folder: Path) -> None:
    """Every table as `folder`/NAME.csv, the cells as they are printed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables(comparison).items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([cell.strip() for cell in row] for row in rows)


def _group_table(groups: list[dict[str, Any]]) -> Rows:
    has_cut = any(group["n_cut"] or any(run["n_cut"] for run in group["runs"]) for group in groups)
    rows = [["group, run", "seed", "examples", "accuracy", "95% interval", "interval from", "tokens", "thoughts"]]
    rows[0] += ["cut"] * has_cut
    for group in groups:
        seeds, examples = ", ".join(map(str, group["seeds"])), str(group["examples"])
        source = f"bootstrap, {' x '.join(group['resampled'])}"
        rows.append([group["group"], seeds, examples, *_figures(group, source, has_cut)])
        for run in group["runs"]:
            rows.append(["  " + run["name"], str(run["seed"]), examples, *_figures(run, "Wilson", has_cut)])
    return rows


def _figures(each: dict[str, Any], source: str, has_cut: bool) -> list[str]:
    low, high = each["interval"]
    lengths = [f"{each[key]:.1f}" for key in ("mean_tokens", "mean_thoughts")]
    cut = ["-" if each["n_cut"] is None else str(each["n_cut"])] * has_cut
    return [f"{each['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", source, *lengths, *cut]


def _steps_table(groups: list[dict[str, Any]]) -> Rows:
    rows = [["steps", "examples", *(group["group"] for group in groups)]]
    for steps, first in groups[0]["accuracy_by_steps"].items():
        shares = [f"{group['accuracy_by_steps'][steps]['accuracy']:.1%}" for group in groups]
        rows.append([steps, str(first["examples"]), *shares])
    return rows


def _difference_table(pairs: list[dict[str, Any]]) -> Rows:
    rows = [["difference of accuracies", "points", "95% interval"]]
    for pair in pairs:
        low, high = (100 * end for end in pair["interval"])
        title = f"{pair['first']} - {pair['second']}"
        rows.append([title, f"{100 * pair['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"])
    return rows


def _mcnemar_table(pairs: list[dict[str, Any]]) -> Rows:
    rows = [["McNemar: A, B", "seed", "only A right", "only B right", "p", "p, Holm"]]
    for pair in pairs:
        for test in pair["mcnemar"]:
            counts = [str(test[key]) for key in ("seed", "only_first", "only_second")]
            p_values = [f"{test[key]:.2g}" for key in ("p", "p_holm")]
            rows.append([f"{pair['first']}, {pair['second']}", *counts, *p_values])
    return rows


def _solved_table(solved: dict[str, Any]) -> Rows:
    share = f"{100 * solved['share']:.4g}%"
    rows = [["group", "seeds", f"solved ({share})", f"steps to {share}, by seed"]]
    for group in solved["groups"]:
        steps = ", ".join("never" if each is None else str(each) for each in group["steps"])
        rows.append([group["group"], str(group["n_seeds"]), str(group["n_solved"]), steps])
    return rows


def _solved_tests_table(solved: dict[str, Any]) -> Rows:
    rows = [["solved: A, B", "steps, p", "p, Holm", "seeds, p", "p, Holm"]]
    for pair in solved["pairs"]:
        p_values = [f"{pair[key]:.2g}" for key in ("p_steps", "p_steps_holm", "p_solved", "p_solved_holm")]
        rows.append([f"{pair['first']}, {pair['second']}", *p_values])
    return rows
