"""What the benchmarks share: GPT-2 small with random weights, ProsQA batches, timing in rounds, the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from coconut_ds import Coconut, LatentContext, distributed
from coconut_ds.console import quiet_libraries
from coconut_ds.curriculum.collator import Tokens, TokenSequence
from coconut_ds.environment import describe_environment
from coconut_ds.memory import GIB
from coconut_ds.model.backbone import END_LATENT, LATENT, START_LATENT, Backbone, add_markers

WINDOW = LatentContext((0.6, 0.3, 0.1))
PROSQA_COLUMNS = 382
"""The longest ProsQA question of the validation set with 6 thoughts, markers and answer."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokenizer", required=True, help="folder or hub id of the GPT-2 tokenizer")
    made.add_argument("--thoughts", type=int, default=6)
    made.add_argument("--memory-limit", type=float, help="GiB a GPU's allocator may use")
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the launcher
    return made


def begin(options: argparse.Namespace) -> None:
    """Seeds, quiet libraries, and the cap on a GPU's memory."""
    quiet_libraries()
    torch.manual_seed(0)
    if torch.cuda.is_available() and options.memory_limit:
        total = torch.cuda.get_device_properties(distributed.device()).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_limit * GIB / total)


def gpt2_small(tokenizer: str, dropout: float = 0.1) -> Backbone:
    """Random weights in the shape of GPT-2 small, by default with its dropout, and the markers."""
    config = GPT2Config(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    backbone = Backbone(GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(tokenizer))
    add_markers(backbone)
    return backbone


def coconut(backbone: Backbone, context: LatentContext | None = WINDOW) -> Coconut:
    ids = backbone.marker_ids()
    model = Coconut(
        backbone.model,
        latent_token_id=ids[LATENT],
        start_latent_id=ids[START_LATENT],
        end_latent_id=ids[END_LATENT],
        eos_token_id=int(backbone.tokenizer.eos_token_id),
        latent_context=context,
    )
    return model.to(distributed.device()).train()


def tokens_of(backbone: Backbone) -> Tokens:
    ids = backbone.marker_ids()
    return Tokens(int(backbone.tokenizer.eos_token_id), ids[START_LATENT], ids[END_LATENT], ids[LATENT])


def sequence_of(columns: int, thoughts: int, latent: int, answer: int = 20) -> TokenSequence:
    """A sequence of ordinary tokens with its thoughts before an end marker and `answer` supervised tokens."""
    prefix = columns - thoughts - 1 - answer
    ids = torch.randint(0, 50_000, (columns,)).tolist()
    ids[prefix : prefix + thoughts] = [latent] * thoughts
    return TokenSequence(ids, prefix, thoughts, prefix + thoughts + 1)


def seconds_by_round(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time everything once a round, one after the other, so that a slow spell of the machine falls on all of it.

    One round before them warms up. Every other round goes backwards: what runs second is not always the same.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in list(work.items())[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(mine / other for mine, other in zip(seconds[name], seconds[to], strict=True))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def finish(options: argparse.Namespace, **results: Any) -> None:
    """The JSON line: results, options, versions and hardware."""
    facts = {"threads": torch.get_num_threads(), "environment": describe_environment()}
    print(json.dumps({**results, **facts, "options": vars(options)}))
