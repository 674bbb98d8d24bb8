"""The engine on real ranks: gradients whatever the split, resets equal to a fresh optimizer, failures on all ranks."""

from __future__ import annotations

import launching
import pytest

CONFIGS = ["zero0", "zero1", "zero2", "zero2_offload"]
pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("ranks", "splits"),
    # 3x3 leaves the last micro-batch smaller, on two ranks the last one is a filler.
    [(1, [[8, 1], [4, 2], [2, 4], [3, 3]]), (2, [[4, 1], [2, 2], [1, 4], [3, 2]])],
    ids=["1 rank", "2 ranks"],
)
def test_gradients_do_not_depend_on_the_split(ranks, splits):
    code = "import rank_checks\nresult = rank_checks.gradient_errors(names, splits)"
    for errors in launching.on_ranks(ranks, code, names=CONFIGS, splits=splits):
        assert len(errors) == len(CONFIGS) * len(splits)
        assert max(errors.values()) < 1e-6, errors


def test_published_normalisation_leaves_fillers_out():
    for loss, mean_of_means in launching.on_ranks(2, "import rank_checks\nresult = rank_checks.micro_batch_loss()"):
        assert loss == pytest.approx(mean_of_means, rel=1e-6)


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in CONFIGS), ("zero2_offload", "bf16")])
def test_a_reset_is_a_fresh_optimizer_bit_for_bit(name, precision):
    code = "import rank_checks\nresult = rank_checks.reset_against_fresh(name, precision)"
    for found in launching.on_ranks(2, code, name=name, precision=precision):
        assert found["same_losses"]
        assert found["largest_difference"] == 0
        assert found["reset_matters"] > 1e-4


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update():
    for rank, found in enumerate(launching.on_ranks(2, "import rank_checks\nresult = rank_checks.non_finite_stops()")):
        assert found["unchanged"]
        assert f"rank {rank} had training examples {found['indices']}" in found["message"]
        assert "nothing was updated" in found["message"]
