"""What the benchmarks share: GPT-2 small with random weights, ProsQA batches, timing in rounds, the JSON line.

With `--toy` a model of one layer and short questions take their place, and nothing has to be at hand: it shows in
seconds that a script works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "preprocessing"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import prosqa
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from coconut_ds import Coconut, LatentContext, strict_json
from coconut_ds.data.batches import Tokens, TokenSequence
from coconut_ds.data.files import read_records
from coconut_ds.data.markers import END_LATENT, LATENT, START_LATENT
from coconut_ds.memory.meter import GIB
from coconut_ds.model import fast
from coconut_ds.model.backbone import Backbone, add_markers, cast_parameters
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.runs.environment import describe_environment
from coconut_ds.runs.terminal import quiet_libraries
from coconut_ds.runtime import distributed
from coconut_ds.runtime.torch_settings import prepare_device

WINDOW = LatentContext((0.6, 0.3, 0.1))
PROSQA_COLUMNS = 382
"""The longest ProsQA question of the validation set with 6 thoughts, markers and answer."""
_ORDINARY_TOKENS = 50_000
"""Of GPT-2's vocabulary, to draw from; a smaller one has its own."""
_TOY_POSITIONS = 128
_TOY_QUESTIONS: dict[str, Any] = {"n_nodes": 5, "min_steps": 2, "max_steps": 2, "form": "edges"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOY_MODEL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": _TOY_POSITIONS}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark; `parse` reads them."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokenizer", help="folder or hub id of the GPT-2 tokenizer")
    made.add_argument("--toy", action="store_true", help="one layer and short questions, to see that the script works")
    made.add_argument("--thoughts", type=int, default=6)
    made.add_argument("--memory-limit", type=float, help="GiB a GPU's allocator may use")
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by the launcher
    return made


def parse(made: argparse.ArgumentParser, **toy: Any) -> argparse.Namespace:
    """The options; with `--toy` the values in `toy` are the defaults, and neither tokenizer nor data have to be named.

    Ends the process with status 2 where one is missing.
    """
    if "--toy" in sys.argv[1:]:
        made.set_defaults(**{"thoughts": 2, **toy})
    options = made.parse_args()
    missing = [f"--{name}" for name in ("tokenizer", "data") if getattr(options, name, "") is None]
    if missing and not options.toy:
        made.error(f"name {' and '.join(missing)}, or try it with --toy")
    return options


def begin(options: argparse.Namespace) -> None:
    """Seeds, quiet libraries, and the cap on a GPU's memory."""
    quiet_libraries()
    torch.manual_seed(0)
    prepare_device()
    if distributed.device().type == "cuda" and options.memory_limit:
        total = torch.cuda.get_device_properties(distributed.device()).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_limit * GIB / total)


def records(options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """The first records of `--data`; of a toy, short questions."""
    return read_records(options.data, count) if not options.toy else questions(options, count)


def questions(options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Generated questions of ProsQA; of a toy, short ones."""
    return list(prosqa.generate(count, "benchmark", **(_TOY_QUESTIONS if options.toy else {})))


def tokenizer_of(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    if not options.toy:
        return AutoTokenizer.from_pretrained(options.tokenizer)
    texts = [text for record in questions(options, 64) for text in (record["question"], record["answer"])]
    return word_tokenizer(texts, _TOY_POSITIONS)


def backbone_of(options: argparse.Namespace, dropout: float = 0.1, **shape: Any) -> Backbone:
    """Random weights in the shape of GPT-2 small, by default with its dropout, and the markers; of a toy, one layer.

    `shape` changes values of its configuration.
    """
    tokenizer = tokenizer_of(options)
    if options.toy:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        shape = {**_TOY_MODEL, **ends, "vocab_size": len(tokenizer), **shape}
    config = GPT2Config(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout, **shape)
    backbone = Backbone(GPT2LMHeadModel(config), tokenizer)
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
    fast.install(model)
    return model.to(distributed.device()).train()


def cast(model: Coconut, dtype: torch.dtype) -> Coconut:
    """The parameters in `dtype`, as DeepSpeed casts them; buffers, which may hold angles, keep theirs."""
    cast_parameters(model, dtype)
    return model


def tokens_of(backbone: Backbone) -> Tokens:
    ids = backbone.marker_ids()
    return Tokens(int(backbone.tokenizer.eos_token_id), ids[START_LATENT], ids[END_LATENT], ids[LATENT])


def sequence_of(columns: int, thoughts: int, latent: int, answer: int = 20) -> TokenSequence:
    """A sequence of ordinary tokens with its thoughts before an end marker and `answer` supervised tokens."""
    prefix = columns - thoughts - 1 - answer
    # The markers are the last three of a vocabulary, this one the last.
    ids = torch.randint(0, min(_ORDINARY_TOKENS, latent - 2), (columns,)).tolist()
    ids[prefix : prefix + thoughts] = [latent] * thoughts
    return TokenSequence(ids, prefix, thoughts, prefix + thoughts + 1)


def seconds_by_round(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time everything once a round, one after the other, so that a slow spell of the machine falls on all of it.

    One round before them warms up, and what runs out of memory there is left out. Every other round goes backwards:
    what runs second is not always the same.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in list(found)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            if number:
                work[name]()
            elif not fits(work[name]):
                del found[name]
                continue
            if distributed.device().type == "cuda":
                torch.cuda.synchronize()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def fits(run: Callable[[], Any]) -> bool:
    """Run it; whether there was memory enough."""
    try:
        run()
    except torch.OutOfMemoryError:
        if distributed.device().type == "cuda":
            torch.cuda.empty_cache()
        return False
    return True


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(mine / other for mine, other in zip(seconds[name], seconds[to], strict=True))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def finish(options: argparse.Namespace, **results: Any) -> None:
    """The JSON line: results, options, versions and hardware."""
    facts = {"threads": torch.get_num_threads(), "environment": describe_environment()}
    print(strict_json.dumps({**results, **facts, "options": vars(options)}))
