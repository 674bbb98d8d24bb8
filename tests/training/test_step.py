"""Figures of a step, and losses that are not numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coconut_ds.training.step import LossScaleError, NonFiniteLossError, Pending, fetch, update


def step(loss: float) -> Pending:
    return Pending(torch.tensor(loss), torch.tensor([7, 1, 30, 40]), [10, 12])


def test_figures():
    figures = fetch(step(2.5), 8)
    assert (figures.loss, figures.n_targets, figures.n_tokens, figures.padding_share) == (2.5, 7, 30, 0.25)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_examples(loss):
    with pytest.raises(NonFiniteLossError) as error:
        fetch(step(loss), 9)
    assert f"loss {loss} at optimizer step 9, nothing was updated" in str(error.value)
    assert "rank 0 had training examples [10, 12]" in str(error.value)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.", LossScaleError),
        ("something else", RuntimeError),
    ],
)
def test_fp16_that_has_no_smaller_loss_scale_says_what_to_do(message, kind):
    def fails() -> None:
        raise RuntimeError(message)

    with pytest.raises(kind) as error:
        update(SimpleNamespace(step=fails, global_steps=7))
    if kind is LossScaleError:
        assert "after 7 optimizer steps; lower lr, set warmup_steps or max_grad_norm" in str(error.value)
