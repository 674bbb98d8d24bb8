"""The curriculum: which steps of an example are replaced by how many thoughts, in which epoch. No torch here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

from coconut_ds.config.methods import METHODS, Method, Traits
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import IcotConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """`n_thoughts` thoughts (or pauses) replace `n_skip` steps of an example, from step `first` on.

    Of the steps that remain the first `n_before` stand before the thoughts, the others after them; of the tokens of the
    latter the first `n_drop` are removed.
    """

    n_skip: int
    n_thoughts: int
    n_drop: int = 0
    per_step: int = field(default=1, compare=False)
    """Thoughts that stand for one step."""
    first: int = 0
    n_before: int = 0

    def replaced(self, steps: Sequence[T]) -> Sequence[T]:
        """Those of an example's steps that are replaced."""
        return steps[self.first : self.first + self.n_skip]

    def before(self, steps: Sequence[T]) -> Sequence[T]:
        """Those that stand before the thoughts."""
        return steps[: self.n_before]

    def after(self, steps: Sequence[T]) -> Sequence[T]:
        """Those that stand after them."""
        return [*steps[self.n_before : self.first], *steps[self.first + self.n_skip :]]


_EVERYTHING = 2**31


@dataclass(frozen=True)
class Curriculum:
    """The schedule of a run, and the layouts of its stages (section 3 of arXiv 2412.06769; iCoT: 2405.14838).

    The fields are the attributes of the run's configuration of the same names.
    """

    method: Method
    thoughts_per_step: int
    epochs_per_stage: int | tuple[int, ...]
    max_latent_stage: int
    pad_latent_to_max: bool
    uniform_prob: float
    seed: int
    icot: IcotConfig = field(default_factory=IcotConfig)
    eval_thoughts: int | None = None
    curriculum: Literal["forward", "reversed"] = "forward"
    """Which steps are replaced first: those after the question, or those before the answer."""

    @classmethod
    def of(cls, config: RunConfig) -> Curriculum:
        settings = {each.name: getattr(config, each.name) for each in fields(cls)}
        return cls(**settings | {"icot": config.icot or IcotConfig()})

    @property
    def traits(self) -> Traits:
        return METHODS[self.method]

    @property
    def n_markers(self) -> int:
        """Marker tokens of a sequence."""
        return 2 if self.traits.has_markers else 0

    def stage(self, epoch: int) -> int:
        """Stage of an epoch counted from 0. Without a curriculum it is always the first, or with thoughts the last."""
        if self.traits.steps == "kept":
            return 0
        if self.traits.steps == "dropped":
            return 0 if self.traits.thoughts == "none" else self.max_latent_stage + 1
        return math.floor(self._stages_after(epoch))

    def layout(self, stage: int, n_steps: int) -> Layout:
        """Layout of an example with `n_steps` steps in `stage`, for the validation loss and, mostly, in training."""
        layout = self._trained_layout(stage, n_steps)
        return layout if self.eval_thoughts is None else replace(layout, n_thoughts=self.eval_thoughts)

    def _trained_layout(self, stage: int, n_steps: int) -> Layout:
        if self.traits.steps == "dropped by token":
            return Layout(0, 0, self._removed(stage))
        if self.traits.steps != "dropped" and stage <= self.max_latent_stage:
            n_skip, n_groups = min(stage, n_steps), stage
        else:
            n_skip, n_groups = n_steps, self._most_stages(n_steps)
        n_thoughts, first = n_groups * self.thoughts_per_step, 0
        if self.curriculum == "reversed":
            first = n_steps - n_skip
        # Without thoughts nothing stands between the steps and the answer.
        return Layout(n_skip, n_thoughts, 0, self.thoughts_per_step, first, n_before=first if n_thoughts else 0)

    def training_layout(self, n_steps: int, epoch: int, index: int, progress: float = 0.0) -> Layout:
        """Layout of training example `index` in `epoch`, of which the share `progress` (below 1) is done.

        `layout`, or with probability `uniform_prob` that of a stage drawn from 0..n_steps. Under icot it depends on
        `progress`, and smoothing may remove a few more tokens. Draws depend on (seed, epoch, index) alone, so that
        ranks, workers and resumed runs agree on them.
        """
        stage = self.stage(epoch)
        if self.traits.steps == "dropped by token":
            extra = self._smoothing(random.Random(f"{self.seed}/{epoch}/{index}"))
            return Layout(0, 0, self._removed(self._stages_after(epoch + progress), extra))
        if self.uniform_prob:
            draw = random.Random(f"{self.seed}/{epoch}/{index}")
            if draw.random() < self.uniform_prob:
                stage = draw.randint(0, n_steps)
        return self.layout(stage, n_steps)

    def layouts(self, n_steps: int) -> set[Layout]:
        """Every layout an example can have in a run, except for the tokens that icot removes."""
        if self.traits.steps != "replaced by stage":
            return {self.layout(self.stage(0), n_steps)}
        return {self.layout(stage, n_steps) for stage in range(self.max_latent_stage + 2)}

    def prompt_thoughts(self, stage: int, n_steps: int) -> int:
        """Number of thoughts in the evaluation prompt of an example with `n_steps` steps."""
        if self.eval_thoughts is not None:
            return self.eval_thoughts
        return min(stage, self._most_stages(n_steps)) * self.thoughts_per_step

    def prompt_layout(self, stage: int, n_steps: int) -> Layout:
        """The layout of that prompt; under a reversed curriculum it has the steps before the thoughts from the data."""
        return replace(self.layout(stage, n_steps), n_thoughts=self.prompt_thoughts(stage, n_steps))

    def _stages_after(self, epochs: float) -> float:
        """Stages that are over after `epochs`, counted from 0, the one under way in part."""
        lengths = self.epochs_per_stage if isinstance(self.epochs_per_stage, tuple) else (self.epochs_per_stage,)
        for stage, length in enumerate(lengths[:-1]):
            if epochs < length:
                return stage + epochs / length
            epochs -= length
        return len(lengths) - 1 + epochs / lengths[-1]

    def _most_stages(self, n_steps: int) -> int:
        return self.max_latent_stage if self.pad_latent_to_max else min(n_steps, self.max_latent_stage)

    def _removed(self, stages: float, extra: int = 0) -> int:
        """Tokens of the chain that are removed after `stages` stages, which need not be a whole number."""
        removed = math.floor(stages * self.icot.tokens_per_stage)
        is_over = self.icot.all_beyond is not None and removed >= self.icot.all_beyond
        return _EVERYTHING if is_over else removed + extra

    def _smoothing(self, draw: random.Random) -> int:
        """Geometric: P(o) is proportional to exp(-lambda o)."""
        rate = self.icot.smoothing
        return 0 if rate is None else math.floor(-math.log(1.0 - draw.random()) / rate)
