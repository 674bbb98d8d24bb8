"""Private names of DeepSpeed and torch: every one is missed when an engine is built, and named in the refusal."""

from __future__ import annotations

import launching
import pytest

from coconut_ds.engine.internals import InternalsError, demand, named
from coconut_ds.engine.operator_build import builds_announced

NAMES = {
    ("zero0", "bf16"): ["optimizer.fp16_groups", "optimizer.fp32_groups"],
    ("zero1", "fp16"): [f"optimizer.loss_scaler.{each}" for each in ("cur_scale", "cur_iter", "last_overflow_iter")]
    + ["optimizer.loss_scaler", "optimizer.loss_scaler.cur_hysteresis"],
    ("zero2", "fp32"): [
        "basic_optimizer",
        "optimizer._hp_optimizer_states_linked",
        "optimizer._lazy_init_hp_params_optimizer_state",
        "a_parameter._hp_mapping",
        "a_parameter._hp_mapping.optim_fragment",
    ],
    ("zero2_offload", "fp32"): ["basic_optimizer.ds_opt_adam", "basic_optimizer.opt_id"],
    ("zero3", "fp32"): [
        "optimizer.fp32_partitioned_groups_flat",
        "optimizer.parameter_offload",
        *(f"a_parameter.{each}" for each in ("ds_id", "ds_tensor", "ds_numel")),
        *(f"optimizer.parameter_offload.{each}" for each in ("_remove_module_hooks", "setup_zero_stage3_hooks")),
        *(f"optimizer.parameter_offload.{each}" for each in ("forward_hooks", "backward_hooks")),
    ],
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, str | None]:
    """By name: what is said when the engine does not have it, in one process."""
    cases = [(ds, precision, names) for (ds, precision), names in NAMES.items()]
    code = "import rank_checks\nresult = rank_checks.without_names(cases)"
    (found,) = launching.on_ranks(1, code, cases=cases)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted({name for names in NAMES.values() for name in names}))
def test_an_engine_without_a_name_is_refused(refusals, name):
    message = refusals[name]
    assert message is not None, "trained without a word"
    last = name.rpartition(".")[2]
    assert f"has no {last}" in message
    assert message.startswith("deepspeed 0.")
    assert message.endswith("install deepspeed==0.19.8")


@pytest.mark.parametrize("name", ["try_acquire", "wait", "release"])
def test_torch_without_a_name_of_its_lock_file_is_refused(monkeypatch, name):
    monkeypatch.delattr(f"torch.utils.file_baton.FileBaton.{name}")
    with pytest.raises(InternalsError, match=f"FileBaton has no {name}, .*install torch=="), builds_announced():
        pass


def test_a_function_that_moved_is_refused():
    with pytest.raises(InternalsError, match=r"no parse_them in deepspeed.launcher.runner; install deepspeed=="):
        named("deepspeed", "deepspeed.launcher.runner", "parse_them")


def test_what_is_there_is_not_refused():
    demand("torch", [], ("append", "pop"))
