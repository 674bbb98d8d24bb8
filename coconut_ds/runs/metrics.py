"""The events in a run's `metrics.jsonl`, which `tracker.py` writes, read back and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from coconut_ds.errors import InputError

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that may not be finite: `strict_json.py` writes null for it, which is read as NaN."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    step: int
    """Optimizer steps taken by then."""


class StageStart(_Record):
    """Epochs count from 1."""

    event: Literal["stage"]
    epoch: int
    stage: int
    n_thoughts: int


class TrainStep(_Record):
    """One optimizer step over all ranks; None for values that earlier versions did not write."""

    event: Literal["train_step"]
    epoch: int
    stage: int
    loss: Number
    step_time_s: float
    peak_memory_gib: float | None = None
    peak_reserved_gib: float | None = None
    """What torch's allocator held at most; None on a CPU."""
    step_loss: Number | None = None
    """Of steps written from their thoughts, without its weight; None without step supervision or thoughts."""
    verbal_loss: Number | None = None
    distance: Number | None = None
    """Of sequences with all steps, and of states from a teacher's, without their weights; None without supervision."""
    direct_loss: Number | None = None
    """Of answers alone, without its weight; None without a mixture."""
    n_tokens: int | None = None
    padding_share: float | None = None
    n_skipped_in_run: int | None = None
    """Steps that fp16 skipped since the run began, this one included; None in other precisions."""


class EpochEvaluation(_Record):
    """The evaluation at the end of an epoch; accuracies are shares from 0 to 1."""

    event: Literal["eval"]
    epoch: int
    stage: int
    valid_loss: Number
    accuracy: float
    n_correct: int
    n_total: int = Field(ge=1)
    mean_new_tokens: float
    examples_per_s: float = Field(gt=0)
    accuracy_by_steps: dict[str, float] = {}
    latent_weights: tuple[Number, ...] = ()
    """Of a learned window, newest state first."""
    mean_thoughts: float | None = None
    """Thoughts among `mean_new_tokens`; None in records of earlier versions, as `n_cut`."""
    n_cut: int | None = None
    """Answers that `max_new_tokens` ended."""


class CheckpointWritten(_Record):
    event: Literal["checkpoint"]
    epoch: int
    path: str
    seconds: float


class End(_Record):
    event: Literal["end"]
    epochs: int
    n_skipped_in_run: int | None = None


_Event = StageStart | TrainStep | EpochEvaluation | CheckpointWritten | End
_Kind = TypeVar("_Kind", bound=_Record)
_EVENT: TypeAdapter[_Event] = TypeAdapter(Annotated[_Event, Field(discriminator="event")])


@dataclass(frozen=True)
class Metrics:
    """The events of a `metrics.jsonl`, by kind, oldest first."""

    stages: tuple[StageStart, ...] = ()
    steps: tuple[TrainStep, ...] = ()
    evaluations: tuple[EpochEvaluation, ...] = ()
    checkpoints: tuple[CheckpointWritten, ...] = ()
    ends: tuple[End, ...] = ()
    n_damaged: int = 0
    """Lines that are not complete events, except the last one of a run that is still writing."""

    def is_finished(self, n_epochs: int) -> bool:
        """Whether at least `n_epochs` epochs were trained to their end."""
        return any(end.epochs >= n_epochs for end in self.ends)


def skipped_text(n_skipped: int, n_steps: int) -> str:
    """For a progress line; empty if no step was skipped. Both counts are of the whole run so far."""
    return f"{n_skipped} of {n_steps} steps skipped" if n_skipped else ""


def skips_most(n_skipped: int, n_steps: int) -> bool:
    return 2 * n_skipped > n_steps


def skipped_warning(n_skipped: int, n_steps: int) -> str:
    """Explains why most steps were skipped, and the way out."""
    return (
        f"fp16: {n_skipped} of {n_steps} optimizer steps were skipped because their gradients overflowed, the weights "
        f"were updated {n_steps - n_skipped} times; lower initial_scale_power (or loss_scale) in the deepspeed file, "
        "lower lr, or use bf16 or fp32"
    )


def read_metrics(path: Path) -> Metrics:
    """The events of a `metrics.jsonl`; events of kinds not known here do not count as damaged.

    Raises InputError if the file is missing or cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; it comes with the first optimizer step") from None
    events: list[_Event] = []
    n_damaged = 0
    # What follows the last newline is empty, or a line that is still being written.
    for line in lines[:-1]:
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            n_damaged += error.errors()[0]["type"] != "union_tag_invalid"
    return Metrics(
        _of_kind(StageStart, events),
        _of_kind(TrainStep, events),
        _of_kind(EpochEvaluation, events),
        _of_kind(CheckpointWritten, events),
        _of_kind(End, events),
        n_damaged,
    )


def _of_kind(kind: type[_Kind], events: list[_Event]) -> tuple[_Kind, ...]:
    return tuple(event for event in events if isinstance(event, kind))
