"""Sections of gpu_check.py: a module each, whose `rows(options)` yields its results one by one.

A row has a `name`, and `ok`: true or false for a check, None for figures alone or where `why` says why it was left out;
`fills` and `value` name a row of docs/PERFORMANCE.md and its text.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The naive twin and the tiny models are those of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import torch
import workload

from coconut_ds.runs.terminal import quiet_libraries
from coconut_ds.runtime import distributed
from coconut_ds.runtime.torch_settings import prepare_device

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
NOT_ON_A_CPU = "not on a CPU"
_GPT2_VOCABULARY = 50_257


def begin(options: argparse.Namespace) -> torch.device:
    """The device to check, in full fp32; ends the process with status 2 if torch sees no GPU and this is no toy."""
    quiet_libraries()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = distributed.device()
    if not (options.toy or device.type == "cuda"):
        # The last line of what a section prints is what the user reads.
        print(f"error: torch {torch.__version__} sees no GPU here; --toy tries the script on a CPU", file=sys.stderr)
        raise SystemExit(2)
    # As a run does: the rank's GPU, cuDNN's attention and half-precision sums off.
    prepare_device()
    return device


def tried(name: str, work: Callable[..., Row], *arguments: Any) -> Row:
    """The row that `work` returns, named; one that raises is a failed check, and the section continues."""
    try:
        return {"name": name, "ok": None, **work(*arguments)}
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"name": name, "ok": False, "error": repr(error), "traceback": traceback.format_exc()[-1500:]}


def left_out(name: str, why: str = NOT_ON_A_CPU) -> Row:
    return {"name": name, "ok": None, "why": why}


def seconds_left(options: argparse.Namespace) -> float:
    return float(options.ends - time.monotonic())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in fp64 on the host."""
    expected = expected.detach().cpu().double()
    difference = found.detach().cpu().double() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients; `model` has none afterwards."""
    found = {name: value.grad.detach().clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def benchmark_options(options: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """What the scripts of benchmarks/ read: those of this check, and a tokenizer of GPT-2's size made of words."""
    tokenizer = options.work / "tokenizer"
    if not (options.toy or tokenizer.exists()):
        _word_tokenizer(options).save_pretrained(tokenizer)
    made = {"toy": options.toy, "tokenizer": None if options.toy else str(tokenizer), "memory_limit": None}
    return argparse.Namespace(**{**made, "thoughts": 2 if options.toy else 6, "data": None, **values})


def _word_tokenizer(options: argparse.Namespace) -> Any:
    texts = [text for each in workload.questions(options, 64) for text in (each["question"], each["answer"])]
    known = len(workload.word_tokenizer(texts, 1024))
    fillers = [f"filler{number}" for number in range(_GPT2_VOCABULARY - known)]
    return workload.word_tokenizer([*texts, *fillers], 1024)


def limit_memory(options: argparse.Namespace) -> None:
    """The cap of --memory-limit on the allocator of a GPU."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(distributed.device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_limit * 2**30 / total))
