"""`thoughts.json` of a run folder: whether its answers depend on its thoughts, by stage; written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coconut_ds.errors import InputError


class Share(BaseModel):
    """A share of the questions, from 0 to 1, with its 95% interval (Wilson)."""

    model_config = ConfigDict(strict=True, frozen=True)

    share: float
    low: float
    high: float


class StageUse(BaseModel):
    """Accuracy after the last epoch with one number of thoughts."""

    model_config = ConfigDict(strict=True, frozen=True)

    n_thoughts: int = Field(ge=0)
    epoch: int
    own: Share
    exchanged: Share | None = None
    """With the thoughts of another question; None without thoughts."""
    followed: Share | None = None
    """Answers which then are those of the other question; None if they are of several others, too."""


class ThoughtUse(BaseModel):
    """What `inspect --by-stage` finds; `question` and `file` are of the last checkpoint, as `inspect` writes them."""

    model_config = ConfigDict(strict=True, frozen=True)

    data: str
    n_questions: int = Field(ge=1)
    stages: list[StageUse]
    question: dict[str, Any]
    file: dict[str, Any]

    @property
    def sentence(self) -> str:
        """What the exchange did in the last stage, in one line."""
        last = self.stages[-1]
        assert last.exchanged is not None  # the last stage has thoughts
        follow = f", and {last.followed.share:.1%} give the other question's answer" if last.followed else ""
        return (
            f"thoughts of {self.n_questions} questions exchanged with another question's: accuracy "
            f"{last.own.share:.1%} -> {last.exchanged.share:.1%}{follow}"
        )


def read_thought_use(path: Path) -> ThoughtUse:
    """Raises InputError for a file that is damaged."""
    try:
        return ThoughtUse.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {error.errors()[0]['msg']}; inspect --by-stage writes it anew") from None
