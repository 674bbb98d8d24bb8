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
import tiny
import torch
from warm_commands import Shell

from coconut_ds import LatentContext
from coconut_ds.data.batches import Tokens, collate_training, training_sequence
from coconut_ds.data.stages import Layout

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
SCRIPTS.remove("gpu_check")  # has lines of its own, see test_gpu_check.py
FACTS = {"threads", "environment", "options"}
RATIOS = {"step_over_floor", "checkpointed_over_plain", "straightforward_over_floor", "window_extra"}
KEYS = {
    "decode": {"decode_speedup", "seconds"},
    "few_rows": {"ratios"},
    "largest_micro_batch": {"largest", "best_tokens_per_second", "tried"},
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
        assert all(len(each["tokens_per_second"]) == 5 for each in found["by_micro_batch"].values())
    if script == "largest_micro_batch":
        fits = {row["micro_batch"]: "failed" not in row for row in found["tried"]}
        assert fits[found["largest"]]
        assert not fits[found["largest"] + 1]


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


def test_on_a_gpu_the_peaks_are_those_of_its_allocator(benchmark, monkeypatch):
    memory = benchmark("memory")
    told = {"is_available": True, "reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in (told | {"max_memory_reserved": 3 * memory.MIB}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(memory, "optimizer_step", lambda *arguments: None)
    monkeypatch.setattr(memory, "measured_peak", lambda *arguments: 1)
    assert memory.step_peak(None, None) == memory._plain_peak(None, None) == 250
    assert memory.reserved() == {"reserved_mib": 3}


@pytest.mark.parametrize("limit", [0, 1, 3, 8, 37, 230, 2**14])
def test_the_largest_micro_batch_is_found_to_a_64th(benchmark, monkeypatch, limit):
    script = benchmark("largest_micro_batch")
    starts = []

    def in_a_process(options, sizes: list[int]) -> list[dict[str, Any]]:
        starts.append(sizes)
        rows = [{"micro_batch": size} for size in sizes if size <= limit]
        return rows + [{"micro_batch": size, "failed": "out of memory"} for size in sizes if size > limit][:1]

    monkeypatch.setattr(script, "_in_a_process", in_a_process)
    rows = list(script.search(None))
    found = max((row["micro_batch"] for row in rows if "failed" not in row), default=0)
    assert found <= limit < found + max(1, found // 64) + (limit == 2**14) * 2**14
    assert len(starts) <= 4


def test_half_precision_leaves_buffers_as_they_are(benchmark):
    workload = benchmark("workload")
    model = tiny.coconut("llama")
    workload.cast(model, torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_the_published_loop_of_the_benchmark_has_the_loss_of_the_passes(benchmark):
    script = benchmark("train_step")
    model = tiny.coconut("gpt2", LatentContext()).eval()
    rows = [tiny.row(9, [3, 4], 4, seed) for seed in (1, 2)]
    sequences = [
        training_sequence(row, Layout(1, 3), Tokens(tiny.PAD, tiny.START, tiny.END, tiny.LATENT)) for row in rows
    ]
    batch = collate_training(sequences, [0, 1], tiny.PAD)
    model(**batch.inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = script._straightforward_loss(model, batch.inputs)
    loss.backward()
    assert loss.item() == pytest.approx(model(**batch.inputs).loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


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
