"""The curriculum: which steps of an example are replaced by how many thoughts, in which epoch. No torch here."""

from __future__ import annotations

import random
from dataclasses import dataclass

from coconut_ds.config import RunConfig


@dataclass(frozen=True)
class Layout:
    """How one example is laid out: `n_thoughts` thoughts stand in place of the first `n_skip` steps."""

    n_skip: int
    n_thoughts: int


@dataclass(frozen=True)
class Curriculum:
    """The schedule of a run, and the layouts it asks for (section 3 of arXiv 2412.06769)."""

    method: str
    thoughts_per_step: int
    epochs_per_stage: int
    max_latent_stage: int
    pad_latent_to_max: bool
    uniform_prob: float
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> Curriculum:
        return cls(
            method=config.method,
            thoughts_per_step=config.thoughts_per_step,
            epochs_per_stage=config.epochs_per_stage,
            max_latent_stage=config.max_latent_stage,
            pad_latent_to_max=config.pad_latent_to_max,
            uniform_prob=config.uniform_prob,
            seed=config.seed,
        )

    @property
    def uses_markers(self) -> bool:
        return self.method == "coconut"

    def stage(self, epoch: int) -> int:
        """Stage of an epoch counted from 0; always 0 where nothing is replaced step by step."""
        return 0 if self.method in ("cot", "no_cot") else epoch // self.epochs_per_stage

    def layout(self, stage: int, n_steps: int) -> Layout:
        """Layout of an example with `n_steps` steps in `stage`, in training and for the validation loss."""
        if self.method == "no_cot":
            return Layout(n_skip=n_steps, n_thoughts=0)
        if stage <= self.max_latent_stage:
            return Layout(n_skip=min(stage, n_steps), n_thoughts=stage * self.thoughts_per_step)
        return Layout(n_skip=n_steps, n_thoughts=self._most_stages(n_steps) * self.thoughts_per_step)

    def training_layout(self, stage: int, n_steps: int, epoch: int, index: int) -> Layout:
        """`layout`, or with probability `uniform_prob` that of a stage drawn from 0..n_steps.

        The draw depends on (seed, epoch, index) alone, so ranks, workers and resumed runs agree on it.
        """
        if self.uniform_prob:
            draw = random.Random(f"{self.seed}/{epoch}/{index}")
            if draw.random() < self.uniform_prob:
                stage = draw.randint(0, n_steps)
        return self.layout(stage, n_steps)

    def prompt_thoughts(self, stage: int, n_steps: int) -> int:
        """Number of thoughts in the evaluation prompt of an example with `n_steps` steps."""
        return min(stage, self._most_stages(n_steps)) * self.thoughts_per_step

    def _most_stages(self, n_steps: int) -> int:
        return self.max_latent_stage if self.pad_latent_to_max else min(n_steps, self.max_latent_stage)
