"""Figures that waited on the device: fetched together, and the first that is not a number named."""

from __future__ import annotations

import pytest
import torch

from coconut_ds.training.step import NonFiniteLossError, Pending, fetch


def steps(*losses: float) -> list[Pending]:
    return [
        Pending(torch.tensor(loss), torch.tensor([7, 1, 30, 40]), [10 * place]) for place, loss in enumerate(losses)
    ]


def test_figures_come_in_order():
    found = fetch(steps(1.5, 2.5), newest=8)
    assert [figures.loss for figures in found] == [1.5, 2.5]
    assert found[0].n_targets == 7
    assert found[0].padding_share == 0.25


def test_a_loss_that_is_not_finite_is_found_late_and_named():
    with pytest.raises(NonFiniteLossError) as error:
        fetch(steps(1.0, float("nan"), float("inf")), newest=9)
    assert "loss nan at optimizer step 8, found 1 steps later (log_every_steps)" in str(error.value)
    assert "had training examples [10]" in str(error.value)


def test_the_newest_is_found_before_the_update():
    with pytest.raises(NonFiniteLossError, match="loss inf at optimizer step 9, nothing was updated"):
        fetch(steps(1.0, float("inf")), newest=9)
