"""Decoding on the cached thoughts beside one question at a time, and a stage switch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

import workload

from coconut_ds import strict_json
from gpu_sections import ROOT, Row, begin, benchmark_options, tried


def rows(options: argparse.Namespace) -> Iterator[Row]:
    begin(options)
    yield tried("decode", _decode, options)
    yield tried("stage switch", _script, options, "stage_switch.py", "--rounds", "3", "--examples", "2000")


def _decode(options: argparse.Namespace) -> Row:
    data = options.work / "prosqa.json"
    # Words are its tokens, so prompts have fewer columns than under GPT-2's tokenizer.
    data.write_text(strict_json.dumps(workload.questions(options, 64)), encoding="utf-8")
    found = _script(options, "decode.py", "--data", str(data))
    if "decode_speedup" not in found:
        return found
    return {**found, "fills": "decoding, batched over alone", "value": f"{found['decode_speedup']:.1f}"}


def _script(options: argparse.Namespace, name: str, *arguments: str) -> Row:
    """The JSON line of a script of benchmarks/; a failed row with the end of what it printed otherwise."""
    given = ["--toy"] if options.toy else ["--tokenizer", benchmark_options(options).tokenizer, *arguments]
    command = [sys.executable, str(ROOT / "benchmarks" / name), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"ok": False, "error": f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"}
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if key not in ("environment", "options")}
