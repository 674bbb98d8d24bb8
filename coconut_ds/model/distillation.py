"""Self-distillation: the state before the answer moves to where visible steps bring it (CODI, arXiv 2502.21074).

The same weights read each example twice: as a student with thoughts, as a teacher with all its steps. With h_l the
state after layer l at the column that predicts the first token of the answer, s student and t teacher,

    L_distance = 1/L sum_l mean_d smooth_l1(h_l^s, stop(h_l^t)) / std(h_l^t)

a mean over examples; beside it stands the teacher's own cross entropy over steps and answer.

Shapes: B rows, T columns, D hidden size, R examples, L layers compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from coconut_ds.data.teacher import Teacher
from coconut_ds.errors import InputError
from coconut_ds.model.loss import summed_cross_entropy
from coconut_ds.model.masks import causal_mask
from coconut_ds.model.passes import LatentPasses


@dataclass(frozen=True)
class Distillation:
    """Which states are compared, and how their distance is scaled."""

    layers: tuple[int, ...] | None = None
    """0 are the embeddings, l the states after layer l, the last after the final norm; None is all of them."""
    deviation: Literal["example", "micro_batch"] = "example"
    """Over which of the teacher's states a layer's standard deviation is taken."""

    def check(self, n_layers: int) -> None:
        """Raise InputError for a layer that a model of `n_layers` does not have."""
        beyond = [layer for layer in self.layers or () if layer > n_layers]
        if beyond:
            raise InputError(
                f"supervision.distill.layers: {', '.join(map(str, beyond))}: the model has {n_layers} layers; name "
                "some from 0, the embeddings, to that number"
            )

    def of(self, hidden_states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The states to compare, of those of all layers."""
        return list(hidden_states) if self.layers is None else [hidden_states[layer] for layer in self.layers]


class StatesAt:
    """States of given cells, collected over the passes of a forward; of a cell in several passes, those of the last."""

    def __init__(self, distillation: Distillation, cells: torch.Tensor, n_columns: int):
        """cells (R,): entries row * n_columns + column."""
        self._distillation = distillation
        self._rows, self._columns = cells // n_columns, cells % n_columns
        self.found: list[torch.Tensor] = []
        """(R, D) of each layer."""

    def read(self, start: int, hidden_states: Sequence[torch.Tensor]) -> None:
        """From a pass over the columns from `start` on; hidden_states (B, columns, D) of all layers."""
        states = self._distillation.of(hidden_states)
        width = states[0].shape[1]
        places = self._columns - start
        is_inside = ((places >= 0) & (places < width))[:, None]
        entries = self._rows * width + places.clamp(0, width - 1)
        here = [each.flatten(0, 1).index_select(0, entries) for each in states]
        self.found = [torch.where(is_inside, *both) for both in zip(here, self.found)] if self.found else here


def teacher_losses(
    model: LatentPasses, teacher: Teacher, distillation: Distillation | None, student: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sums of the cross entropies with all steps, of the distances of all examples, and with the answer alone.

    0-d each; None without `distillation`, and without rows with the answer alone. `student`: the states of
    `teacher.student`, (R, D) of each layer.
    """
    base = model.base_causallm
    embeds = base.get_input_embeddings()(teacher.input_ids)
    output = base.base_model(
        inputs_embeds=embeds,
        attention_mask=causal_mask(teacher.attention_mask, base.config, embeds.dtype),
        position_ids=teacher.position_ids,
        use_cache=False,
        **({} if distillation is None else {"output_hidden_states": True}),
    )
    states = output.last_hidden_state.flatten(0, 1)

    def written(entries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_cross_entropy(model.lm_head, states.index_select(0, entries - 1), targets)

    verbal = written(teacher.supervised, teacher.targets)
    direct = None
    if teacher.direct is not None and teacher.direct_targets is not None:
        direct = written(teacher.direct, teacher.direct_targets)
    if distillation is None:
        return verbal, None, direct
    goals = [
        each.detach().flatten(0, 1).index_select(0, teacher.before_answer)
        for each in distillation.of(output.hidden_states)
    ]
    return verbal, summed_distance(student, goals, distillation.deviation), direct


def summed_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], deviation: Literal["example", "micro_batch"]
) -> torch.Tensor:
    """Sum over examples of the distance of their states (R, D) of each layer, a mean over layers; 0-d, in fp32."""
    total = torch.zeros((), device=student[0].device)
    for ours, goal in zip(student, teacher, strict=True):
        goal = goal.float()
        scale: torch.Tensor | float = 1.0  # of a filler, which has no examples
        if len(goal):
            scale = goal.std(dim=1, keepdim=True) if deviation == "example" else goal.std()
        distance = F.smooth_l1_loss(ours.float(), goal, reduction="none") / scale
        total = total + distance.mean(dim=1).sum()
    return total / len(student)
