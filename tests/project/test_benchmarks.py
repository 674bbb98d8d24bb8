"""Every script of benchmarks/ runs at toy size and ends in its JSON line; rows out of memory stay in the table."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_commands import Shell

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
FACTS = {"threads", "environment", "options"}
RATIOS = {"step_over_floor", "checkpointed_over_plain", "straightforward_over_floor", "window_extra"}
KEYS = {
    "decode": {"decode_speedup", "seconds"},
    "few_rows": {"ratios"},
    "memory": {"per_example_mib", "rows"},
    "scaling": {"exponents"},
    "stage_switch": {"stage_switch_s", "tokenize_s", "cached_s"},
    "train_step": RATIOS | {"window_extra_alone", "by_micro_batch"},
}
"""The figures of each script; a new one gets its own here."""
SIGNED = ("window_extra", "window_extra_alone", "exponents")
"""Differences and slopes, which noise can make negative."""


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Iterator[Shell]:
    with Shell(ROOT, tmp_path_factory.mktemp("benchmarks") / "stand_ins") as shell:
        yield shell


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_in_its_json_line(shell, script):
    outcome = shell.run(f"python benchmarks/{script}.py --toy")
    assert outcome.status == 0, outcome.output
    assert "Traceback" not in outcome.output
    line = outcome.output.splitlines()[-1]
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found.keys() == KEYS[script] | FACTS
    assert found["options"]["toy"] is True
    assert found["environment"]["packages"]["torch"]
    figures = {key: found[key] for key in KEYS[script]}
    assert {name for name, number in numbers(figures) if not is_sane(name, number)} == set()
    if script == "memory":
        assert [row["micro_batch"] for row in found["rows"]] == [2, 3]
        assert all(row["planned_over_measured"] == pytest.approx(1, abs=0.1) for row in found["rows"]), line
    if script == "train_step":
        assert list(found["by_micro_batch"]) == ["1", "2"]
        assert all(len(each["seconds"]) == 5 and not each["out_of_memory"] for each in found["by_micro_batch"].values())


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value


def is_sane(name: str, number: float) -> bool:
    is_signed = any(part in SIGNED for part in name.split("/"))
    return math.isfinite(number) and (is_signed or number > 0) and abs(number) < 1e6


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_tokenizer_a_script_says_what_is_missing(shell, script):
    outcome = shell.run(f"python benchmarks/{script}.py")
    assert outcome.status == 2
    assert "error: name --tokenizer" in outcome.output
    assert "or try it with --toy" in outcome.output


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script by its name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    yield importlib.import_module
    for name in ("workload", *SCRIPTS):
        sys.modules.pop(name, None)


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_does_not_fit_is_left_out_of_the_rounds(benchmark):
    seconds = benchmark("workload").seconds_by_round({"fits": lambda: None, "does not": full}, rounds=2)
    assert list(seconds) == ["fits"]
    assert len(seconds["fits"]) == 2


def test_a_row_that_runs_out_of_memory_stays_in_the_table(benchmark):
    memory = benchmark("memory")
    cost = memory.ActivationCost(torch.tensor([2 * memory.MIB]), torch.tensor([3 * memory.MIB]))
    assert memory._unless_full(lambda rows: rows, 3) == 3
    assert memory._unless_full(lambda rows: full(), 3) is None
    fits = memory._row(2, 5 * memory.MIB, memory.MIB, cost, 2 * memory.MIB)
    assert (fits["step_mib"], fits["per_example_mib"], fits["planned_over_measured"]) == (5, 2, 1)
    place = {"deepspeed": "zero0.json", "precision": "fp32", "activations": "kept"}
    for peak, measured in ((None, 1), (5 * memory.MIB, None)):
        row = memory._row(4, peak, 0, cost, measured)
        assert row["planned_mib"] == 4
        assert memory._line(place | row).endswith("4  out of memory")
