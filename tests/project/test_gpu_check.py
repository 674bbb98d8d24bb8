"""benchmarks/gpu_check.py in full at toy size, what it makes of bad sections, and its lines that only a GPU takes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import launching
import psutil
import pytest
import torch
import warm_server

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 500


@pytest.fixture(scope="module")
def gpu_check():
    """The script as a module, importable with its sections as it is for itself."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(ROOT / "benchmarks") in sys.modules[name].__file__:
            del sys.modules[name]


def lines_of(path: Path) -> dict[str, dict]:
    return {line["section"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


# What it makes of sections that are not as they should be; these import nothing.

STUBS = {
    "fine": 'yield {"name": "a", "ok": True}\n    yield {"name": "b", "ok": None, "fills": "a row", "value": "7"}',
    "wrong": 'yield {"name": "a", "ok": True}\n    yield {"name": "b", "ok": False, "error": 0.5}',
    "raises": 'yield {"name": "a", "ok": True}\n    raise RuntimeError("a typo")',
    "hangs": 'import subprocess\n    yield {"name": "a", "ok": True}\n    subprocess.run(["sleep", "987"])',
    "left_out": 'yield {"name": "a", "ok": None, "why": "not on a CPU"}',
}


@pytest.fixture
def stubs(gpu_check, monkeypatch, tmp_path):
    """Run sections of the names in STUBS; the exit status and the lines of the file."""
    for name, body in STUBS.items():
        (tmp_path / f"stub_{name}.py").write_text(f"def rows(options):\n    {body}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_operators_built", lambda *arguments: nullcontext())

    def run(*names: str, expected_s: float = 1, may_fail: bool = False, deadline: float = 60):
        sections = [gpu_check.Section(name, expected_s, "", may_fail, f"stub_{name}") for name in names]
        monkeypatch.setattr(gpu_check, "SECTIONS", tuple(sections))
        out = tmp_path / "out.jsonl"
        return gpu_check.main(["--out", str(out), "--deadline", str(deadline)]), lines_of(out)

    return run


def test_a_section_that_fails_crashes_or_hangs_leaves_the_lines_of_the_others(stubs, capsys):
    status, lines = stubs("fine", "wrong", "raises", "hangs", "left_out")
    assert status == 1
    found = {name: line["status"] for name, line in lines.items()}
    assert found == {
        "fine": "passed",
        "wrong": "failed",
        "raises": "crashed",
        "hangs": "out of time",
        "left_out": "not on a CPU",
    }
    assert all(line["rows"][0]["name"] == "a" for line in lines.values()), "rows stay, however a section ends"
    assert "a typo" in lines["raises"]["why"]
    printed = capsys.readouterr().out
    assert 'FAILED wrong: {"name": "b", "ok": false, "error": 0.5}' in printed
    assert "| a row | fine | 7 |" in printed
    sleeping = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "987"]]
    assert sleeping == [], "what a killed section has started is ended with it"


@pytest.mark.parametrize(
    ("names", "settings", "wanted"),
    [
        (["fine", "left_out"], {}, 0),
        (["fine", "raises"], {}, 3),
        (["hangs"], {}, 3),
        (["fine"], {"expected_s": 50, "deadline": 20}, 4),
        (["wrong"], {"expected_s": 50, "deadline": 20}, 4),
        (["wrong", "raises"], {"may_fail": True}, 0),
    ],
)
def test_the_exit_status_says_what_failed(stubs, names, settings, wanted):
    status, lines = stubs(*names, **settings)
    assert status == wanted
    assert list(lines) == names
    if wanted == 4:
        assert lines[names[0]]["status"] == "skipped"
        assert "left of the deadline" in lines[names[0]]["why"]


def test_rows_that_were_cut_off_are_left_out(gpu_check, tmp_path):
    assert gpu_check._read_rows(tmp_path / "none") == []
    (tmp_path / "rows").write_text('{"name": "a", "ok": true}\n{"name": "b", "o')
    assert gpu_check._read_rows(tmp_path / "rows") == [{"name": "a", "ok": True}]


def test_a_line_is_there_before_the_next_section_starts(gpu_check, stubs, monkeypatch, tmp_path):
    seen = []
    whole = gpu_check._in_a_process

    def note(*arguments):
        out = tmp_path / "out.jsonl"
        seen.append(len(out.read_text().splitlines()) if out.exists() else 0)
        return whole(*arguments)

    monkeypatch.setattr(gpu_check, "_in_a_process", note)
    stubs("fine", "wrong", "left_out")
    assert seen == [0, 1, 2]


# The sections themselves.

KEYS = {
    "facts": {"environment", "to_device_gb_s", "to_host_gb_s", "tflop_s", "kernels"},
    "exact": {"loss_error", "gradient_error", "greedy_equal", "error", "naive_error", "ratio", "losses_equal"},
    "waits": {"accumulating", "fetching", "updating", "parameters"},
    "engine": {"loss_error", "weight_error", "losses_equal", "weights_apart", "losses_apart"},
    "memory": {"largest", "tokens_per_second", "tried", "peaks"},
    "time": {"kernels", "host_ms", "whole_ms", "busy_share", "seconds", "tokens_per_second", "ratio", "aim"},
    "cudnn": {"first_s", "second_s"},
    "decode": {"decode_speedup", "stage_switch_s"},
    "run": {"status", "checkpoints", "finished", "printed"},
    "two_ranks": {"loss_error", "weight_error"},
}
"""Figures of each section's rows; a new section gets its own here."""
NOT_ON_A_CPU = {"waits", "cudnn"}


@pytest.fixture(scope="module")
def toy(gpu_check, tmp_path_factory):
    """Everything at toy size, each section in a process with the libraries loaded: status, lines, what it printed."""
    folder = tmp_path_factory.mktemp("gpu_check")

    def warm(section, options, rows: Path, limit: float, output) -> int | None:
        arguments = [str(ROOT / "benchmarks" / "gpu_check.py"), "--section", section.name, "--module", section.source]
        arguments += ["--rows-file", str(rows), "--seconds", str(limit), "--work", str(options.work), "--toy"]
        environment = gpu_check._environment(options)
        process = warm_server.fork(warm_server.become, arguments, str(folder), environment, [output.name] * 2, 1)
        process.join(limit)
        process.kill()
        return process.exitcode

    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as printed:
        patch.setenv("PYTHONPATH", launching.environment()["PYTHONPATH"])
        patch.setattr(gpu_check, "_in_a_process", warm)
        patch.setattr(gpu_check, "_operators_built", lambda *arguments: nullcontext())
        patch.setattr(sys, "stdout", printed)
        status = gpu_check.main(["--toy", "--deadline", str(TIME_LIMIT_S), "--out", str(folder / "out.jsonl")])
    return status, lines_of(folder / "out.jsonl"), (folder / "printed").read_text(encoding="utf-8")


@pytest.mark.ranks
def test_all_of_it_runs_on_a_cpu(gpu_check, toy):
    status, lines, printed = toy
    assert list(lines) == [section.name for section in gpu_check.SECTIONS] == list(KEYS)
    for name, line in lines.items():
        assert line["status"] == ("not on a CPU" if name in NOT_ON_A_CPU else "passed"), line
        assert {key for row in line["rows"] for key in row} >= KEYS[name] | {"name", "ok"}
        assert len({row["name"] for row in line["rows"]}) == len(line["rows"])
    assert status == 0, printed


@pytest.mark.ranks
def test_it_fills_every_row_that_the_documentation_leaves_empty(toy):
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8").partition("## On a GPU")[2]
    empty = re.findall(r"^\| ([^|]+) \| (\w+) \| [^|]+ \|$", text, re.MULTILINE)
    _, lines, printed = toy
    filled = [(row["fills"], name) for name, line in lines.items() for row in line["rows"] if "fills" in row]
    assert filled == [row for row in empty if row[1] != "section"]
    assert all(f"| {row} | {name} | " in printed for row, name in filled)


def test_without_a_gpu_it_says_so_and_ends(gpu_check, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path / "out.jsonl")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT_S)
    assert done.returncode == 2
    assert re.fullmatch(r"error: torch \S+ sees no GPU here; --toy tries the script on a CPU", done.stderr.strip())


# Lines that only a GPU takes, with what torch says of one replaced.


@pytest.fixture
def section(gpu_check):
    return lambda name: importlib.import_module(f"gpu_sections.{name}")


@pytest.fixture
def cuda(monkeypatch):
    """Replace functions of torch.cuda by what they would return; a name that torch does not have is an error."""

    def patch(**returned):
        for name, value in {"is_available": True, "synchronize": None, **returned}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)

    return patch


def test_facts_of_a_card(section, cuda, monkeypatch):
    facts = section("facts")
    card = types.SimpleNamespace(name="a card", multi_processor_count=68, total_memory=11 * 2**30)
    cuda(
        get_device_properties=card,
        get_device_capability=(7, 5),
        get_arch_list=["sm_75"],
        mem_get_info=(9 * 2**30, 11 * 2**30),
        memory_reserved=2**30,
    )
    cpu = torch.device("cpu")
    assert facts._context(cpu)["context_mib"] == 1024
    monkeypatch.setenv("PATH", "")
    found = facts._card(cpu)
    assert (found["card"], found["capability"], found["memory_gib"], found["driver"]) == ("a card", [7, 5], 11, None)


def test_waits_are_refused_and_counted(section, monkeypatch, cuda):
    waits = section("waits")
    modes = []
    cuda()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits._refused():
        assert modes == ["error"]
    with waits._counted() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)
    assert modes == ["error", "default", "warn", "default"]
    assert [each.partition(":")[0] for each in found] == ["test_gpu_check.py"]


def test_the_allocator_is_capped(section, monkeypatch, cuda):
    shares = []
    cuda(get_device_properties=types.SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    importlib.import_module("gpu_sections").limit_memory(types.SimpleNamespace(memory_limit=10.0))
    assert shares == [0.125]


def test_a_benchmark_gets_a_tokenizer_of_the_size_of_gpt2(section, tmp_path):
    section("facts")
    options = types.SimpleNamespace(toy=False, work=tmp_path)
    made = importlib.import_module("gpu_sections").benchmark_options(options, rounds=1)
    workload = importlib.import_module("workload")
    assert (made.thoughts, made.rounds) == (6, 1)
    assert len(workload.tokenizer_of(made)) == 50_257


def test_a_row_that_raises_is_a_failed_check(section):
    section("facts")
    sections = importlib.import_module("gpu_sections")
    row = sections.tried("a row", lambda: 1 / 0)
    assert (row["name"], row["ok"]) == ("a row", False)
    assert "ZeroDivisionError" in row["error"]
    assert sections.seconds_left(types.SimpleNamespace(ends=time.monotonic() + 50)) == pytest.approx(50, abs=5)
