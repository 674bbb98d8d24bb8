"""What a person sees while a run goes on: lines and bars, from rank 0 only."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

import datasets
import transformers
from tqdm import tqdm

from coconut_ds import distributed

Item = TypeVar("Item")
_PLAIN_LINES_PER_EPOCH = 4


def quiet_libraries() -> None:
    """No bars but our own (two ranks loading weights would draw over each other), no advice meant for DeepSpeed."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def say(text: str) -> None:
    """Print a line from rank 0."""
    if distributed.is_main():
        tqdm.write(text)
        sys.stdout.flush()


def progress(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Pass `items` on, with a bar on a terminal and a few plain lines elsewhere."""
    if not distributed.is_main():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True)
    else:
        started = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if done % max(1, total // _PLAIN_LINES_PER_EPOCH) == 0 and done < total:
                say(f"{label}: {done}/{total}, {done / (time.monotonic() - started):.2f} steps/s")
