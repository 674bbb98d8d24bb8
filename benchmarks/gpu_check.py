"""All that only a GPU can say about this code, in ten minutes of one card.

    python benchmarks/gpu_check.py [--memory-limit 10.06] [--deadline 560] [--out gpu_check.jsonl] [--only SECTION ...]
    python benchmarks/gpu_check.py --toy

Before: a checkout of this repository, torch 2.7 or newer that sees the card, a C++ compiler, and the packages of
setup.cfg but wandb, matplotlib and scipy. Where the machine has no network take wheels along, made on another one
with the same Python (torch stays the machine's own):
    pip download --only-binary=:all: --no-deps -d wheels 'transformers>=5.23,<6' tokenizers huggingface_hub \
        safetensors datasets dill multiprocess xxhash pyarrow pydantic pydantic_core annotated_types \
        typing_inspection hjson py-cpuinfo msgpack einops ninja psutil
    pip wheel --no-deps -w wheels 'deepspeed>=0.19.8,<0.20'
and install them there by `pip install --no-index --no-deps wheels/*.whl`. No model and no data is needed: weights and
questions are generated.

Then: one command, the first line above, from the folder of the checkout. Sections run one after another, the most
important ones first, each in a process of its own that is killed at its limit; one that no longer fits into
--deadline (seconds) is skipped. The lines of a section are in --out as soon as it ends.

Back come: --out (gpu_check.jsonl, a line per section with all its figures; send this), gpu_check.log beside it (what
the sections printed), and on the terminal a table, every check that failed, and rows for docs/PERFORMANCE.md.
Exit status: 0 if every check passed, 1 if one failed, 3 if none failed but a section crashed or ran out of time, 4 if
none did but the deadline left some out, 2 if there is no GPU or an option is wrong. --toy runs everything on the CPU
with tiny models; what only a GPU can do says so and is no pass.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut_ds import strict_json

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 2
_TAIL = 2000
_BAD = ("failed", "crashed", "out of time", "skipped")
_STATUS = {"failed": 1, "crashed": 3, "out of time": 3, "skipped": 4}


@dataclass(frozen=True)
class Section:
    """A module whose `rows(options)` yields its results; `expected_s` on a GPU, of which it may take twice as much."""

    name: str
    expected_s: int
    proves: str
    may_fail: bool = False
    module: str = ""

    @property
    def source(self) -> str:
        return self.module or f"gpu_sections.{self.name}"


SECTIONS: tuple[Section, ...] = (
    Section("facts", 25, "the card, its driver, context, transfers and kernels"),
    Section("exact", 60, "golden values, fast against naive, half precision, recomputing with dropout"),
    Section("waits", 25, "forward and backward do not synchronise with the device"),
    Section("engine", 70, "every ZeRO file and precision; overflow, reset, restore"),
    Section("memory", 130, "planned against measured; the largest micro-batch"),
    Section("time", 110, "tokens per second, over the floor, over the published loop", module="gpu_sections.speed"),
    Section("cudnn", 20, "what cuDNN attention costs for a new shape"),
    Section("decode", 30, "decoding and stage switch"),
    Section("run", 60, "the real entry: stop by a signal, resume, inspect"),
    Section("two_ranks", 30, "two gloo ranks on one GPU", may_fail=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.section:
        return _run_here(options)
    ends = time.monotonic() + options.deadline
    log = options.out.with_suffix(".log")
    options.out.unlink(missing_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as work, log.open("wb") as output, _operators_built(options, output):
        options.work = Path(work)
        for section in SECTIONS:
            if section.name not in options.only:
                continue
            outcome = _outcome(section, options, ends - time.monotonic(), output)
            outcomes.append(outcome)
            _append(options.out, outcome)
            print(_line(outcome), flush=True)
            if outcome["status"] == "no gpu":
                print(outcome["why"], file=sys.stderr)
                return NO_GPU
    _print_findings(outcomes, options, log)
    return next((_STATUS[bad] for bad in _BAD if any(_counts(each) == bad for each in outcomes)), 0)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument("--deadline", type=float, default=560, help="seconds for everything (default: 560)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        default=10.06,
        help="GiB the allocator may use (default: 10.06, the 10.76 of an 11 GB card less the context)",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to see that the script works")
    for hidden in ("--section", "--module"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    for hidden in ("--rows-file", "--work"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    return options


def _outcome(section: Section, options: argparse.Namespace, left: float, output: Any) -> dict[str, Any]:
    """What the line of --out says of a section: its status, seconds and rows."""
    place = {"section": section.name, "may_fail": section.may_fail, "toy": options.toy}
    if left < (1 if options.toy else section.expected_s):
        why = f"{left:.0f} s were left of the deadline, and it takes {section.expected_s}"
        return {**place, "status": "skipped", "seconds": 0.0, "rows": [], "why": why}
    # The whole time for a toy, since a CPU may be busy with other work.
    limit = left if options.toy else min(left, 2.0 * section.expected_s)
    started, begins_at = time.monotonic(), output.tell()
    rows_file = options.work / f"{section.name}.jsonl"
    status = _in_a_process(section, options, rows_file, limit, output)
    rows = _read_rows(rows_file)
    found = {**place, "seconds": round(time.monotonic() - started, 1), "limit_s": round(limit, 1), "rows": rows}
    output.flush()
    tail = Path(output.name).read_bytes()[begins_at:].decode(errors="replace")[-_TAIL:]
    if status is None:
        return {**found, "status": "out of time", "why": f"it was killed after {limit:.0f} s; {tail}"}
    if status == NO_GPU:
        return {**found, "status": "no gpu", "why": tail.splitlines()[-1] if tail else ""}
    if status:
        return {**found, "status": "crashed", "why": f"exit status {status}; {tail}"}
    if any(row["ok"] is False for row in rows):
        return {**found, "status": "failed"}
    return {**found, "status": "not on a CPU" if rows and all(row.get("why") for row in rows) else "passed"}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were written in full: a section can be killed at any moment."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _in_a_process(section: Section, options: argparse.Namespace, rows: Path, limit: float, output: Any) -> int | None:
    """Run a section; its exit status, or None if it was killed after `limit` seconds."""
    command = [
        sys.executable,
        __file__,
        "--section",
        section.name,
        "--module",
        section.source,
        "--rows-file",
        str(rows),
    ]
    command += ["--seconds", str(limit), "--memory-limit", str(options.memory_limit), "--work", str(options.work)]
    command += ["--toy"] if options.toy else []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=_environment(options),
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(options: argparse.Namespace) -> dict[str, str]:
    # Shapes change from step to step, which the allocator's fixed segments suit badly.
    own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return {**own, **os.environ, **({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if options.toy else {})}


@contextlib.contextmanager
def _operators_built(options: argparse.Namespace, output: Any) -> Iterator[None]:
    """In the background: DeepSpeed's CPU Adam takes a minute to compile, and the first sections do not need it."""
    log = str(options.out.with_suffix(".build.log"))
    command = [sys.executable, "-m", "coconut_ds.engine.operator_build", log]
    environment = _environment(options)
    builder = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True)
    try:
        yield
    finally:
        _kill(builder)


def _append(path: Path, outcome: dict[str, Any]) -> None:
    """One line, on the disk before the next section starts: a machine that is lent can be taken back."""
    with path.open("a", encoding="utf-8") as file:
        file.write(strict_json.dumps(outcome) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _counts(outcome: dict[str, Any]) -> str:
    """The status as it counts for the exit status."""
    return "passed" if outcome["may_fail"] else str(outcome["status"])


def _line(outcome: dict[str, Any]) -> str:
    rows = outcome["rows"]
    passed = sum(row["ok"] is True for row in rows)
    failed = sum(row["ok"] is False for row in rows)
    head = f"{outcome['section']:<10} {outcome['status']:<13} {outcome['seconds']:>6.1f} s"
    return f"{head}  {passed} passed, {failed} failed"


def _print_findings(outcomes: list[dict[str, Any]], options: argparse.Namespace, log: Path) -> None:
    print("\nsection    status         seconds")
    for outcome in outcomes:
        print(_line(outcome))
    rows = [(outcome["section"], row) for outcome in outcomes for row in outcome["rows"]]
    for outcome in outcomes:
        if outcome.get("why"):
            print(f"\n{outcome['section']} {outcome['status']}: {outcome['why'].strip()}")
    for name, row in rows:
        if row["ok"] is False:
            print(f"\nFAILED {name}: {strict_json.dumps(row)}")
    print("\nrows of docs/PERFORMANCE.md, On a GPU" + (" (figures of a toy mean nothing)" if options.toy else ""))
    for name, row in rows:
        if "fills" in row:
            print(f"| {row['fills']} | {name} | {row['value']} |")
    print(f"\nsend {options.out}; what the sections printed is in {log}")


def _run_here(options: argparse.Namespace) -> int:
    """In the process of a section: its rows go to --rows-file one by one."""
    with options.rows_file.open("a", encoding="utf-8") as file:
        options.ends = time.monotonic() + options.seconds
        for row in importlib.import_module(options.module).rows(options):
            file.write(strict_json.dumps(row) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
