"""The methods a run can train, and what sets them apart; docs/METHODS.md gives a formula and an example for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "coconut", "cot", "no_cot", "no_thoughts", "pause", "pause_as_thought", "icot", "no_curriculum", "codi"
]


@dataclass(frozen=True)
class Traits:
    """What a method puts between question and answer."""

    thoughts: Literal["continuous", "pause", "none"]
    """Positions before the steps: fed hidden states, fed the embedding of one learned token, or none."""
    has_markers: bool
    """Whether `<|start-latent|>` and `<|end-latent|>` stand around them."""
    steps: Literal["replaced by stage", "kept", "dropped", "dropped by token"]


METHODS: dict[Method, Traits] = {
    "coconut": Traits("continuous", True, "replaced by stage"),
    "cot": Traits("none", False, "kept"),
    "no_cot": Traits("none", False, "dropped"),
    "no_thoughts": Traits("none", False, "replaced by stage"),
    "pause": Traits("pause", False, "dropped"),
    "pause_as_thought": Traits("pause", True, "replaced by stage"),
    "icot": Traits("none", False, "dropped by token"),
    "no_curriculum": Traits("continuous", True, "dropped"),
    # With a fixed number of thoughts and supervision.distill, which RunConfig sees to.
    "codi": Traits("continuous", True, "dropped"),
}
