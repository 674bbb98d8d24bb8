"""How an optimizer step is split into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from coconut_ds.config.rules import ConfigError, Problem
from coconut_ds.config.run_config import RunConfig


@dataclass(frozen=True)
class BatchSizes:
    """How an optimizer step is split: `total = micro * accumulation * world`, in examples."""

    micro: int
    accumulation: int
    world: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world


def stated_micro_batch(config: RunConfig) -> int:
    """Examples per micro-batch as far as the run file says: `auto` counts as 1."""
    return 1 if config.batch_size_training == "auto" else config.batch_size_training


def batch_sizes(config: RunConfig, world: int) -> BatchSizes:
    """Split the effective batch over `world` ranks; raises ConfigError if it does not divide.

    `batch_size_training: auto` counts as 1 here, until a size has been chosen.
    """
    micro, accumulation = stated_micro_batch(config), config.gradient_accumulation_steps
    if config.train_batch_size is None:
        return BatchSizes(micro, accumulation or 1, world)
    if accumulation is None and config.train_batch_size % (micro * world) == 0:
        accumulation = config.train_batch_size // (micro * world)
    if accumulation is None or micro * accumulation * world != config.train_batch_size:
        accumulated = f" x {accumulation} accumulated" if accumulation else ""
        message = (
            f"train_batch_size: {config.train_batch_size} cannot be made from {micro} per micro-batch{accumulated} "
            f"x {world} ranks; "
            "change batch_size_training, or leave gradient_accumulation_steps out so that it is worked out"
        )
        raise ConfigError("batch sizes", [Problem(("train_batch_size",), message)])
    return BatchSizes(micro, accumulation, world)
