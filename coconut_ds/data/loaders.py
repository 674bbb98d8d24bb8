"""Per-stage data loaders over one tokenized set: training steps in a seeded order, evaluation of each example once."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import operator
import random
import signal
from collections.abc import Callable
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.data.batches import (
    Batch,
    Size,
    Tokens,
    TokenSequence,
    collate_prompts,
    collate_training,
    grown,
    prompt_sequence,
    shuffle_facts,
    training_sequence,
)
from coconut_ds.data.stages import Curriculum
from coconut_ds.runtime import distributed

POOL = 128
"""Minimum number of examples that are sorted by length together."""

ID_COLUMNS = ["question_ids", "steps_ids", "answer_ids"]


class TrainingSteps(torch.utils.data.Dataset):
    """One epoch of one rank: item s is the list of micro-batches of the epoch's optimizer step s, from 0.

    The order is a permutation fixed by (seed, epoch). Step s has the same examples for any number of ranks and any
    micro-batch size with the same total. Every rank gets the same number of micro-batches; at the end of the data the
    missing ones are fillers without a supervised token.

    `group_by_length` sorts the examples of a step by question length, longest first, before they are split into
    micro-batches: less padding, the same optimizer step. Steps of fewer than `POOL` examples are cut from sorted pools
    of at least that size, and come in random order.

    `in_step` makes the number of passes equal on all ranks, that of the rank with the most, as ZeRO-3 requires.
    """

    def __init__(
        self,
        examples: Dataset,
        curriculum: Curriculum,
        tokens: Tokens,
        sizes: BatchSizes,
        rank: int,
        epoch: int,
        group_by_length: bool = True,
        in_step: bool = False,
    ):
        self._in_step = in_step
        self._examples = _rows(examples)
        self._curriculum = curriculum
        self._tokens = tokens
        self._sizes = sizes
        self._rank = rank
        self._epoch = epoch
        generator = torch.Generator().manual_seed(curriculum.seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=generator)
        if group_by_length:
            order = _grouped(order, _question_lengths(self._examples), sizes.total, generator)
        self._order: list[int] = order.tolist()

    def __len__(self) -> int:
        return steps_per_epoch(len(self._order), self._sizes)

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)}")
        sizes = self._sizes
        chosen = self._order[step * sizes.total : (step + 1) * sizes.total]
        at_once = sizes.micro * sizes.world
        progress = step / len(self)
        return [self._of_rank(chosen[start : start + at_once], progress) for start in range(0, len(chosen), at_once)]

    def _of_rank(self, indices: list[int], progress: float) -> Batch:
        """This rank's micro-batch; `indices` are those of all ranks' simultaneous micro-batches."""
        micro = self._sizes.micro
        mine = slice(self._rank * micro, (self._rank + 1) * micro)
        if not self._in_step:
            return self._micro_batch(indices[mine], progress)
        ranks = range(self._sizes.world)
        all_of_them = [self._micro_batch(indices[rank * micro : (rank + 1) * micro], progress) for rank in ranks]
        size = functools.reduce(operator.or_, map(Size.of, all_of_them))
        return grown(all_of_them[self._rank], size, self._tokens.pad)

    def _micro_batch(self, indices: list[int], progress: float) -> Batch:
        sequences = []
        for index, row in zip(indices, self._examples[indices].to_pylist()):
            layout = self._curriculum.training_layout(len(row["steps_ids"]), self._epoch, index, progress)
            if self._tokens.fact_end is not None:
                draw = random.Random(f"{self._curriculum.seed}/{self._epoch}/{index}/facts")
                row["question_ids"] = shuffle_facts(row["question_ids"], self._tokens, draw)
            sequences.append(training_sequence(row, layout, self._tokens))
        tokens = self._tokens
        has = (tokens.step_end is not None, tokens.reads_steps, tokens.answers_alone)
        return collate_training(sequences, indices, tokens.pad, *has)


def _grouped(order: torch.Tensor, lengths: torch.Tensor, total: int, generator: torch.Generator) -> torch.Tensor:
    """`order` (N,) regrouped into steps of `total` examples of similar length, longest first; lengths (N,)."""
    grouped = []
    for pool in order.split(total * max(1, -(-POOL // total))):
        by_length = pool[lengths[pool].argsort(descending=True, stable=True)]
        steps = by_length.split(total)
        whole = [steps[place] for place in torch.randperm(len(pool) // total, generator=generator)]
        # A smaller step can only be the last of the epoch.
        grouped += [*whole, *steps[len(whole) :]]
    return torch.cat(grouped)


def _question_lengths(examples: Dataset) -> torch.Tensor:
    """Tokens per question, (N,), from the offsets of the Arrow column, without reading the tokens."""
    table = examples.select_columns("question_ids").with_format("arrow")[:]
    return torch.tensor(pyarrow.compute.list_value_length(table["question_ids"]).to_numpy())


def steps_per_epoch(n_examples: int, sizes: BatchSizes) -> int:
    """Optimizer steps in an epoch; the last one may be smaller."""
    return -(-n_examples // sizes.total)


def training_loader(steps: TrainingSteps, first: int = 0, num_workers: int | None = None) -> DataLoader:
    """Loader over the optimizer steps of an epoch, from step `first` on; `num_workers` as in the run file."""
    return DataLoader(steps, batch_size=None, sampler=range(first, len(steps)), **_loading(num_workers))


def loss_loader(
    examples: Dataset,
    curriculum: Curriculum,
    tokens: Tokens,
    stage: int,
    batch_size: int,
    rank: int,
    world: int,
    num_workers: int | None = None,
) -> DataLoader:
    """This rank's share of a set in the training layout of `stage`, every example once over all ranks."""

    def sequence(row: dict[str, Any]) -> TokenSequence:
        return training_sequence(row, curriculum.layout(stage, len(row["steps_ids"])), tokens)

    share = _share(examples, batch_size, rank, world)
    return _evaluation_loader(examples, share, sequence, collate_training, tokens.pad, num_workers)


def prompt_loader(
    examples: Dataset,
    curriculum: Curriculum,
    tokens: Tokens,
    stage: int,
    batch_size: int,
    rank: int,
    world: int,
    num_workers: int | None = None,
) -> DataLoader:
    """This rank's share of a set as prompts of `stage`, every example once over all ranks."""

    def sequence(row: dict[str, Any]) -> TokenSequence:
        return prompt_sequence(row, curriculum.prompt_layout(stage, len(row["steps_ids"])), tokens)

    share = _share(examples, batch_size, rank, world)
    return _evaluation_loader(examples, share, sequence, collate_prompts, tokens.pad, num_workers)


def _share(examples: Dataset, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """The batches of a rank, each a list of indices: similar lengths together, so that little is padded."""
    # Dealt round-robin, so that ranks have about the same to do.
    mine = _question_lengths(examples).argsort(stable=True)[rank::world].tolist()
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _evaluation_loader(
    examples: Dataset,
    batches: Any,
    sequence: Callable[[dict[str, Any]], TokenSequence],
    collate: Callable[[list[TokenSequence], list[int], int], Batch],
    pad: int,
    num_workers: int | None,
) -> DataLoader:
    rows = _rows(examples)

    def collated(indices: list[int]) -> Batch:
        return collate(list(map(sequence, rows[indices].to_pylist())), indices, pad)

    return DataLoader(batches, batch_size=None, collate_fn=collated, **_loading(num_workers))


def _rows(examples: Dataset) -> Dataset:
    """The token columns of a set, read as Arrow tables: `rows[indices].to_pylist()` is a dict for each row."""
    return examples.select_columns(ID_COLUMNS).with_format("arrow")


def _loading(num_workers: int | None) -> dict[str, Any]:
    """By default a worker makes batches ahead beside a GPU; on a CPU it would compete with the ranks for cores."""
    on_gpu = distributed.device().type == "cuda"
    n_workers = int(on_gpu) if num_workers is None else num_workers
    # A fork has the set in memory; other ways of starting one would pickle it and the functions of this module.
    how = {"prefetch_factor": 2, "multiprocessing_context": "fork", "worker_init_fn": _ignore_requests_to_stop}
    ahead = how if n_workers else {}
    # A separate generator: a loader draws a number when it starts, and a run resumed within an epoch starts one more.
    return {"generator": torch.Generator(), "num_workers": n_workers, "pin_memory": on_gpu, **ahead}


def _ignore_requests_to_stop(worker: int) -> None:
    """A signal that asks the whole job to stop must not end this process: its rank needs it for the current step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends the children it still has by SIGTERM, and would wait without end for one that ignores it."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
