"""The engine on real ranks: gradients whatever the split, resets equal to a fresh optimizer, failures on all ranks."""

from __future__ import annotations

from pathlib import Path

import launching
import pytest

CONFIGS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("ranks", "splits"),
    # 3x3 leaves the last micro-batch smaller, on two ranks the last one is a filler.
    [(1, [[8, 1], [4, 2], [2, 4], [3, 3]]), (2, [[4, 1], [2, 2], [1, 4], [3, 2]])],
    ids=["1 rank", "2 ranks"],
)
@pytest.mark.parametrize("speed", ["plain", "fast", "recomputed"])
def test_gradients_do_not_depend_on_the_split(ranks, splits, speed):
    code = "import rank_checks\nresult = rank_checks.gradient_errors(names, splits, speed)"
    for errors in launching.on_ranks(ranks, code, names=CONFIGS, splits=splits, speed=speed):
        assert len(errors) == len(CONFIGS) * len(splits)
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(
    ("ranks", "splits", "speed", "everything"),
    [
        (1, [[3, 3]], "recomputed", True),
        (2, [[1, 4], [3, 2]], "plain", False),
        (2, [[1, 4], [3, 2]], "recomputed", True),
    ],
)
def test_gradients_of_all_losses_do_not_depend_on_the_split(ranks, splits, speed, everything):
    """Micro-batches with and without steps to write, fillers, ranks with different numbers of them; other layouts."""
    weights = "(0.5, 0.7, 0.6, 2.0, 0.3)"
    code = f"import rank_checks\nresult = rank_checks.gradient_errors(names, splits, speed, {weights}, everything)"
    for errors in launching.on_ranks(ranks, code, names=CONFIGS, splits=splits, speed=speed, everything=everything):
        assert len(errors) == len(CONFIGS) * len(splits)
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(("ranks", "splits", "speed"), [(1, [[3, 3]], "fast"), (2, [[1, 4], [3, 2]], "recomputed")])
def test_gradients_of_adapters_do_not_depend_on_the_split(ranks, splits, speed):
    """All losses, a copied decoder with adapters of its own, Jacobi iterations; the model below is frozen."""
    weights = "(0.5, 0.7, 0.6, 2.0, 0.3)"
    code = f"import rank_checks\nresult = rank_checks.gradient_errors(names, splits, speed, {weights}, True, True)"
    for errors in launching.on_ranks(ranks, code, names=CONFIGS, splits=splits, speed=speed):
        assert len(errors) == len(CONFIGS) * len(splits)
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_stages_are_the_same_with_every_file(ranks):
    """Losses step by step and final weights of plain torch, with fewer and more thoughts on each rank."""
    exact = [(name, "fp32", speed) for name in CONFIGS for speed in ("plain", "fast", "recomputed")]
    exact.append(("hf_trainer", "fp32", "fast"))
    speeds = {"zero1": "plain", "zero2": "recomputed"}
    bf16 = [(name, "bf16", speeds.get(name, "fast")) for name in CONFIGS]
    fp16 = [(name, "fp16", speeds.get(name, "fast")) for name in CONFIGS if name != "zero0"]
    code = "import rank_checks\nresult = rank_checks.matrix(cases)"
    (outcomes, *_) = launching.on_ranks(ranks, code, cases=[*exact, *bf16, *fp16])
    for case, found in zip([*exact, *bf16, *fp16], outcomes, strict=True):
        assert found["loss"] < (1e-5 if case[1] == "fp32" else 0.02), (case, found)
        # A weight moves by 3e-3 a step, in a direction that hangs on the last digits of small gradients.
        assert found["weight"] < (5e-4 if case[1] == "fp32" else 0.015), (case, found)
        assert (found["overflows"] > 0) is (case[1] == "fp16"), (case, found)


def test_many_micro_batches_in_bf16_are_no_less_exact_than_one():
    """Their sum is in fp32; the shares of one micro-batch are summed in bf16 only within kernels."""
    cases = [(name, accumulation) for name in ("zero1", "zero2", "zero2_offload", "zero3") for accumulation in (1, 64)]
    (found,) = launching.on_ranks(
        1, "import rank_checks\nresult = [rank_checks.bf16_error(*c) for c in cases]", cases=cases
    )
    errors = dict(zip(cases, found, strict=True))
    for name, _ in cases:
        assert errors[name, 64] < errors[name, 1] < 0.02, errors


def test_resets_need_no_more_memory():
    code = "import rank_checks\nresult = [rank_checks.reset_growth(name) for name in names]"
    for outcomes in launching.on_ranks(2, code, names=CONFIGS):
        for name, (before, after) in zip(CONFIGS, outcomes, strict=True):
            assert after == before, name


def test_an_offloaded_step_copies_each_gradient_once_and_waits_for_none():
    """Against DeepSpeed's own checks (`fast: off`), which wait twice for each gradient: the same to the last bit."""
    cases = [(precision, 1, fast) for precision in ("fp32", "fp16") for fast in ("auto", "off")]
    cases += [("fp16", 2, "auto"), ("fp16", 2, "off")]
    code = "import rank_checks\nresult = [rank_checks.offloaded_steps(*case) for case in cases]"
    (found,) = launching.on_ranks(1, code, cases=cases)
    by_case = dict(zip(cases, found, strict=True))
    for (precision, accumulation, fast), mine in by_case.items():
        own = by_case[precision, accumulation, "off"]
        assert (mine["losses"], mine["weights"]) == (own["losses"], own["weights"])
        assert mine["applied"]
        assert (len(set(mine["losses"])) < len(mine["losses"])) is (precision == "fp16"), "steps that overflowed"
        n, counted = mine["parameters"], mine["counted"]
        assert counted["to the fp32 gradient on the host"] == n
        assert "back to the device" not in counted
        assert counted.get("to a sum on the host", 0) == (0 if accumulation == 1 else accumulation * n)
        assert counted["waits"] > 2 * n if fast == "off" else counted["waits"] <= 3, (precision, counted)


def test_ranks_leave_nothing_in_shared_memory():
    code = "from coconut_ds.engine.build import start_process_group\nfrom coconut_ds.runtime import distributed\n"
    code += "import torch, glob\nstart_process_group()\ndistributed.sum_over_ranks(torch.ones(4))\n"
    code += "result = glob.glob(f'/dev/shm/deepspeed_allreduce_buffer_*_{os.environ[\"MASTER_PORT\"]}_*')"
    for seen in launching.on_ranks(2, code):
        assert seen, "the buffers are there while ranks run; without them this test shows nothing"
        assert not [name for name in seen if Path(name).exists()]


def test_published_normalisation_leaves_fillers_out():
    for loss, mean_of_means in launching.on_ranks(2, "import rank_checks\nresult = rank_checks.micro_batch_loss()"):
        assert loss == pytest.approx(mean_of_means, rel=1e-6)


def test_a_reset_is_a_fresh_optimizer_bit_for_bit():
    cases = [*((name, "fp32") for name in CONFIGS), ("zero2_offload", "bf16"), ("zero0", "bf16"), ("zero3", "bf16")]
    cases += [("zero1", "fp16"), ("zero2_offload", "fp16")]
    code = "import rank_checks\nresult = [rank_checks.reset_against_fresh(*case) for case in cases]"
    for outcomes in launching.on_ranks(2, code, cases=cases):
        for case, found in zip(cases, outcomes, strict=True):
            assert found["same_losses"], case
            assert found["largest_difference"] == 0, case
            assert found["reset_matters"] > 1e-4, case


SAVED = [*((name, "fp32") for name in CONFIGS), ("zero0", "bf16"), ("zero2_offload", "bf16"), ("zero3", "bf16")]
SAVED += [("zero1", "fp16"), ("zero2_offload", "fp16")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[int, list[dict]]:
    """By number of ranks: a checkpoint of every file, and what the run that made it did next."""
    code = "import rank_checks\nresult = rank_checks.saved(cases, folder)"
    folder = tmp_path_factory.mktemp("saved")
    return {n: launching.on_ranks(n, code, cases=SAVED, folder=str(folder / str(n))) for n in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restored_engine_continues_bit_for_bit(checkpoints, ranks):
    code = (
        "import rank_checks\nresult = [rank_checks.gone_on([case], [path])[0][0] for case, path in zip(cases, paths)]"
    )
    paths = [[each["path"] for each in outcomes] for outcomes in checkpoints[ranks]]
    assert paths.count(paths[0]) == ranks
    restored = launching.on_ranks(ranks, code, cases=SAVED, paths=paths[0])
    for expected, found in zip(checkpoints[ranks], restored, strict=True):
        for case, mine, other in zip(SAVED, found, expected, strict=True):
            assert mine["losses"] == other["losses"], case
            assert mine["drawn"] == other["drawn"], case
            assert mine["loss_scale"] == other["loss_scale"], case
            assert bool(mine["loss_scale"]) is (case[1] == "fp16")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_resumes_under_any_file_and_number_of_ranks(checkpoints, ranks):
    cases = [(name, "fp32") for name in CONFIGS]
    sources = [(case, each) for n in (1, 2) for case, each in zip(SAVED, checkpoints[n][0]) if case[1] == "fp32"]
    code = "import rank_checks\nresult = rank_checks.gone_on(cases, paths)"
    (found, *_) = launching.on_ranks(ranks, code, cases=cases, paths=[each["path"] for _, each in sources])
    for case, outcomes in zip(cases, found, strict=True):
        for (source, expected), mine in zip(sources, outcomes, strict=True):
            assert mine["losses"] == pytest.approx(expected["losses"], abs=1e-5), (source, case)


def test_a_checkpoint_changes_its_precision(checkpoints):
    """Masters and moments are fp32 in every precision, so all that differs is the rounding of the steps after it."""
    cases = [("zero2", "bf16"), ("zero3", "bf16"), ("zero0", "bf16"), ("zero1", "fp32"), ("zero3", "fp32")]
    code = "import rank_checks\nresult = rank_checks.gone_on(cases, paths)"
    (found, *_) = launching.on_ranks(2, code, cases=cases, paths=[each["path"] for each in checkpoints[2][0]])
    for case, outcomes in zip(cases, found, strict=True):
        for source, expected, mine in zip(SAVED, checkpoints[2][0], outcomes, strict=True):
            tolerance = 1e-5 if case[1] == source[1] == "fp32" else 0.05
            assert mine["losses"] == pytest.approx(expected["losses"], abs=tolerance), (source, case)


def test_a_checkpoint_of_adapters_continues_bit_for_bit_and_under_another_file(tmp_path):
    cases = [("zero1", "fp32"), ("zero2_offload", "bf16"), ("zero3", "fp32"), ("zero0", "bf16"), ("zero2", "fp16")]
    code = "import rank_checks\nresult = rank_checks.saved(cases, folder, lora=True)"
    (expected, *_) = launching.on_ranks(2, code, cases=cases, folder=str(tmp_path))
    paths = [each["path"] for each in expected]
    assert all(Path(path, "model", "adapter_model.safetensors").is_file() for path in paths)
    assert not any(Path(path, "model", "model.safetensors").exists() for path in paths)
    code = (
        "import rank_checks\n"
        "result = [rank_checks.gone_on([case], [path], lora=True)[0][0] for case, path in zip(cases, paths)]\n"
        "result.append(rank_checks.gone_on([['zero3', 'fp32']], paths[:1], lora=True)[0][0])"
    )
    (found, *_) = launching.on_ranks(2, code, cases=cases, paths=paths)
    *same, other = found
    for case, mine, its in zip(cases, same, expected, strict=True):
        assert (mine["losses"], mine["loss_scale"]) == (its["losses"], its["loss_scale"]), case
    assert other["losses"] == pytest.approx(expected[0]["losses"], abs=1e-5)


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update():
    outcomes = launching.on_ranks(2, "import rank_checks\nresult = rank_checks.non_finite_stops()")
    for rank, found in enumerate(outcomes):
        assert found["unchanged"]
        assert "nothing was updated" in found["message"]
        assert f"rank {rank} had training examples {found['indices']}" in outcomes[0]["message"]
