"""From the end of one stage to the first batch of the next, and tokenizing at start.

    python benchmarks/stage_switch.py --tokenizer FOLDER [--examples 18000] [--rounds 5]
    python benchmarks/stage_switch.py --toy

Generates ProsQA, tokenizes it with an empty cache and again with a full one, and switches stages: the loader of the
next stage is made, its order drawn and grouped by length, and its first window (128 examples) collated. Prints a table
and one JSON line.
"""

from __future__ import annotations

import atexit
import os
import shutil
import statistics
import tempfile
import time

# Before `datasets` is imported: a cache that is empty, and gone afterwards.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

import workload

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.data.batches import Tokens
from coconut_ds.data.loaders import TrainingSteps, training_loader
from coconut_ds.data.records import tokenize
from coconut_ds.data.stages import Curriculum


def main() -> None:
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    parser = workload.parser(__doc__)
    parser.add_argument("--examples", type=int, default=18_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = workload.parse(parser, examples=64, rounds=1)
    workload.begin(options)
    tokenizer = workload.tokenizer_of(options)
    records = workload.questions(options, options.examples)
    tokenizing = []
    for _ in range(2):
        started = time.perf_counter()
        examples = tokenize(records, tokenizer)
        tokenizing.append(time.perf_counter() - started)
    curriculum = Curriculum("coconut", 1, 1, 6, True, 0.0, 0)
    epoch = iter(range(1, 10**6))

    def switch() -> None:
        windows = TrainingSteps(
            examples, curriculum, Tokens(50256, 50257, 50258, 50259), BatchSizes(8, 16, 1), 0, next(epoch)
        )
        next(iter(training_loader(windows)))

    seconds = workload.seconds_by_round({"switch": switch}, options.rounds)["switch"]
    print(f"tokenizing {options.examples} examples: {tokenizing[0]:.1f} s, from the cache {tokenizing[1]:.2f} s")
    print(f"stage switch to the first window: {workload.spread(seconds)} s")
    workload.finish(
        options, stage_switch_s=statistics.median(seconds), tokenize_s=tokenizing[0], cached_s=tokenizing[1]
    )


if __name__ == "__main__":
    main()
