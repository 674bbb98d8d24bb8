"""The engine on real ranks: gradients whatever the split, resets equal to a fresh optimizer, failures on all ranks."""

from __future__ import annotations

from pathlib import Path

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
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_gradients_do_not_depend_on_the_split(ranks, splits, checkpointed):
    code = "import rank_checks\nresult = rank_checks.gradient_errors(names, splits, checkpointed)"
    for errors in launching.on_ranks(ranks, code, names=CONFIGS, splits=splits, checkpointed=checkpointed):
        assert len(errors) == len(CONFIGS) * len(splits)
        assert max(errors.values()) < 1e-6, errors


def test_ranks_leave_nothing_in_shared_memory():
    buffers = Path("/dev/shm").glob
    before = set(buffers("deepspeed_allreduce_buffer_*"))
    code = "from coconut_ds.engine.build import start_process_group\nfrom coconut_ds import distributed\n"
    code += "import torch, glob\nstart_process_group()\ndistributed.sum_over_ranks(torch.ones(4))\n"
    code += "result = glob.glob(f'/dev/shm/deepspeed_allreduce_buffer_*_{os.environ[\"MASTER_PORT\"]}_*')"
    for seen in launching.on_ranks(2, code):
        assert seen, "the buffers are there while ranks run; without them this test shows nothing"
    assert set(buffers("deepspeed_allreduce_buffer_*")) == before


def test_published_normalisation_leaves_fillers_out():
    for loss, mean_of_means in launching.on_ranks(2, "import rank_checks\nresult = rank_checks.micro_batch_loss()"):
        assert loss == pytest.approx(mean_of_means, rel=1e-6)


def test_a_reset_is_a_fresh_optimizer_bit_for_bit():
    cases = [*((name, "fp32") for name in CONFIGS), ("zero2_offload", "bf16")]
    code = "import rank_checks\nresult = [rank_checks.reset_against_fresh(*case) for case in cases]"
    for outcomes in launching.on_ranks(2, code, cases=cases):
        for case, found in zip(cases, outcomes, strict=True):
            assert found["same_losses"], case
            assert found["largest_difference"] == 0, case
            assert found["reset_matters"] > 1e-4, case


def test_a_restored_engine_goes_on_as_if_it_had_not_stopped(tmp_path):
    cases = [*((name, "fp32") for name in CONFIGS), ("zero2", "bf16")]
    cases = [(name, precision, str(tmp_path / f"{name}_{precision}")) for name, precision in cases]
    code = "import rank_checks\nresult = [rank_checks.saved_and_restored(*case) for case in cases]"
    for outcomes in launching.on_ranks(2, code, cases=cases):
        for case, found in zip(cases, outcomes, strict=True):
            if "offload" in case[0]:
                # DeepSpeed's CPU Adam multiplies its bias corrections up step by step, and computes them as powers
                # after a restart: the same numbers to the last bit or two of a float.
                assert found["restored"] == pytest.approx(found["going_on"], rel=2e-6), case
            else:
                assert found["restored"] == found["going_on"], case
            assert found["same_draws"], case
            assert found["step"] == 2, case


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update():
    for rank, found in enumerate(launching.on_ranks(2, "import rank_checks\nresult = rank_checks.non_finite_stops()")):
        assert found["unchanged"]
        assert f"rank {rank} had training examples {found['indices']}" in found["message"]
        assert "nothing was updated" in found["message"]
