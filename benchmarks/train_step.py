"""Seconds per optimizer step and peak memory of a GPT-2-shaped Coconut on ProsQA, beside a plain forward-backward.

    deepspeed --num_gpus 1 benchmarks/train_step.py --data FILE.json --tokenizer FOLDER [--micro-batch 4] [--steps 10]

Random weights in the shape of GPT-2 small; the first `micro-batch` x `steps` examples of the file, the thoughts of the
last stage. The floor is one pass over the same tokens without thoughts, same loss, same optimizer step. Peak memory is
live tensor bytes of one step outside the timing (what a GPU's allocator would see, optimizer states included), and the
resident set of the process. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from coconut_ds import Coconut, LatentContext
from coconut_ds.config import BatchSizes, RunConfig
from coconut_ds.curriculum.collator import Batch, Tokens
from coconut_ds.curriculum.examples import read_records, tokenize
from coconut_ds.curriculum.loaders import TrainingWindows
from coconut_ds.curriculum.stages import Curriculum
from coconut_ds.engine.build import build_engine, describe_device, start_process_group
from coconut_ds.engine.ds_config import read_ds_json, resolve_ds_config
from coconut_ds.memory import GIB, LiveTensorMeter, peak_memory_gib
from coconut_ds.model.backbone import END_LATENT, LATENT, START_LATENT, Backbone, add_markers
from coconut_ds.training.step import optimizer_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ProsQA JSON")
    parser.add_argument("--tokenizer", required=True, help="folder of the GPT-2 tokenizer")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--thoughts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after one to warm up")
    parser.add_argument("--deepspeed", default="ds_configs/zero2_offload.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    start_process_group()
    torch.manual_seed(0)
    config = RunConfig(deepspeed=options.deepspeed, batch_size_training=options.micro_batch)
    sizes = BatchSizes(options.micro_batch, 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    backbone = Backbone(GPT2LMHeadModel(GPT2Config()), tokenizer)
    add_markers(backbone)
    engine = build_engine(_coconut(backbone), config, _ds_config(config, sizes))
    engine.train()

    examples = tokenize(read_records(options.data, options.micro_batch * (options.steps + 1)), tokenizer)
    results = {}
    for name, thoughts in (("plain pass", 0), (f"{options.thoughts} thoughts", options.thoughts)):
        windows = _windows(examples, backbone, sizes, thoughts)
        results[name] = _measure(engine, windows)
    _report(results, options)


def _coconut(backbone: Backbone) -> Coconut:
    ids = backbone.marker_ids()
    return Coconut(
        backbone.model,
        latent_token_id=ids[LATENT],
        start_latent_id=ids[START_LATENT],
        end_latent_id=ids[END_LATENT],
        eos_token_id=int(backbone.tokenizer.eos_token_id),
        latent_context=LatentContext((0.6, 0.3, 0.1)),
    )


def _ds_config(config: RunConfig, sizes: BatchSizes) -> dict:
    return resolve_ds_config(read_ds_json(config.deepspeed), config, sizes, describe_device())


def _windows(examples, backbone: Backbone, sizes: BatchSizes, thoughts: int) -> list[list[Batch]]:
    ids = backbone.marker_ids()
    tokens = Tokens(int(backbone.tokenizer.eos_token_id), ids[START_LATENT], ids[END_LATENT], ids[LATENT])
    # Stage 1 of one latent stage: every step replaced, the wanted number of thoughts in their place.
    curriculum = Curriculum("coconut", thoughts, 1, 0 if thoughts == 0 else 1, True, 0.0, 0)
    windows = TrainingWindows(examples, curriculum, tokens, sizes, rank=0, epoch=2)
    return [windows[index] for index in range(len(windows))]


def _measure(engine, windows: list[list[Batch]]) -> dict[str, float]:
    optimizer_step(engine, windows[0], "token")
    seconds = []
    for window in windows[1:]:
        started = time.perf_counter()
        optimizer_step(engine, window, "token")
        seconds.append(time.perf_counter() - started)
    before = sum(_state_bytes(engine))
    widest = max(windows, key=lambda window: window[0].inputs["input_ids"].shape[1])
    with LiveTensorMeter() as meter:
        optimizer_step(engine, widest, "token")
    return {
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "tokens_per_step": statistics.mean(float(w[0].inputs["attention_mask"].sum()) for w in windows[1:]),
        "columns": statistics.mean(w[0].inputs["input_ids"].shape[1] for w in windows[1:]),
        "model_states_gib": before / GIB,
        "step_tensors_peak_gib": meter.peak / GIB,
        "resident_peak_gib": peak_memory_gib(),
    }


def _state_bytes(engine):
    """Bytes that live between steps: parameters, fp32 masters where apart, moments."""
    storages = {}
    held = [*engine.module.parameters()]
    for group in engine.basic_optimizer.param_groups:
        held += group["params"]
    held += [value for state in engine.basic_optimizer.state.values() for value in state.values()]
    for value in held:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    yield from storages.values()


def _report(results: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    floor = results["plain pass"]["median_s"]
    heads = ("median s", "fastest", "slowest", "ratio", "states GiB", "step GiB", "RSS GiB")
    print(" " * 12 + "".join(f"{head:>12}" for head in heads))
    for name, found in results.items():
        figures = [found["median_s"], found["fastest_s"], found["slowest_s"], found["median_s"] / floor]
        figures += [found["model_states_gib"], found["step_tensors_peak_gib"], found["resident_peak_gib"]]
        print(f"{name:>12}" + "".join(f"{figure:>12.2f}" for figure in figures))
    facts = {"micro_batch": options.micro_batch, "threads": torch.get_num_threads(), "deepspeed": options.deepspeed}
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
