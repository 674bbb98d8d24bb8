"""Files of a run's `predictions/`, with what `inference/evaluator.py` makes: written, found and read back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coconut_ds.errors import InputError, did_you_mean
from coconut_ds.runs.metrics import Number
from coconut_ds.runs.paths import RunFolder, epoch_of


class Prediction(BaseModel):
    """A line of a predictions file; earlier versions wrote no `thoughts` and no `cut`."""

    model_config = ConfigDict(strict=True, frozen=True)

    index: int
    question: str
    expected: str
    given: str = ""
    correct: bool
    text: str = ""
    n_steps: int = Field(ge=0)
    n_thoughts: int = Field(ge=0)
    n_new_tokens: int = Field(ge=0)
    cut: bool | None = None
    """Whether `max_new_tokens`, which is `n_new_tokens` then, ended the answer."""
    thoughts: tuple[tuple[tuple[str, Number], ...], ...] = ()
    """For each thought the most probable vocabulary tokens under the LM head, with their probabilities."""


@dataclass(frozen=True)
class CutAnswers:
    """How many of some answers were cut, and the limits they reached, the `max_new_tokens` of their evaluations."""

    count: int
    limits: tuple[int, ...]


def cut_answers(answers: Iterable[Prediction]) -> CutAnswers | None:
    """None if one of them is from an earlier version, which did not record it."""
    answers = list(answers)
    if any(answer.cut is None for answer in answers):
        return None
    cut = [answer.n_new_tokens for answer in answers if answer.cut]
    return CutAnswers(len(cut), tuple(sorted(set(cut))))


def cut_warning(n_cut: int, n_total: int, max_new_tokens: int, key: str = "max_new_tokens") -> str:
    """Explains cut answers, and the way out; `key` is the spelling of the limit where it was set."""
    return (
        f"{n_cut} of {n_total} answers reached {key} ({max_new_tokens}) before their end and are compared as cut off "
        f"there; raise {key}, unless the model is not trained enough yet to end its answers"
    )


def last_epoch(names: list[str]) -> str | None:
    """The name of the highest epoch among those of predictions files; None if there is none."""
    epochs = {epoch: name for name in names if (epoch := epoch_of(name)) is not None}
    return epochs[max(epochs)] if epochs else None


def chosen_file(folder: RunFolder, name: str | None) -> Path:
    """The predictions file that `name` means; None: that of the last epoch. Raises InputError if it is missing."""
    names = folder.prediction_names()
    name = last_epoch(names) if name is None else name.removesuffix(".jsonl")
    place = folder.predictions
    if name is None:
        raise InputError(f"{place} has no epoch_NNNN.jsonl: the run has not ended an epoch; or use --predictions")
    if name not in names:
        raise InputError(f"{place} has no {name}.jsonl{did_you_mean(name, names)}; it has {len(names)} other files")
    return folder.predictions_file(name)


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """The predictions of a file in order of their index; raises InputError for a file with anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; evaluate the run again") from None
    predictions: dict[int, Prediction] = {}
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        try:
            prediction = Prediction.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            key = "".join(f"{part}: " for part in first["loc"])
            raise InputError(f"{place}: {key}{first['msg']}; not a whole prediction, evaluate the run again") from None
        if prediction.index in predictions:
            raise InputError(f"{place}: index {prediction.index} stands there twice; evaluate the run again")
        predictions[prediction.index] = prediction
    if not predictions:
        raise InputError(f"{path} is empty; evaluate the run again")
    return tuple(predictions[index] for index in sorted(predictions))
