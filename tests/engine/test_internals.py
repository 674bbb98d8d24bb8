"""Private names of DeepSpeed and torch: every one is missed when an engine is built, and named in the refusal."""

from __future__ import annotations

import runpy
import sys
from importlib import util

import launching
import pytest
from deepspeed.launcher import runner
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from coconut_ds.engine import internals
from coconut_ds.engine.hostfile import demand_hostfile
from coconut_ds.engine.internals import InternalsError
from coconut_ds.engine.operator_build import builds_announced
from coconut_ds.errors import InputError

NAMES = {
    ("zero0", "fp32"): ["global_steps"],
    ("zero0", "bf16"): ["optimizer.fp16_groups", "optimizer.fp32_groups", "optimizer.optimizer"],
    ("zero1", "fp16"): [f"optimizer.loss_scaler.{each}" for each in ("cur_scale", "cur_iter", "last_overflow_iter")]
    + ["optimizer.loss_scaler", "optimizer.loss_scaler.cur_hysteresis", "optimizer.loss_scaler.dynamic"],
    ("zero2", "fp32"): [
        "optimizer",
        "basic_optimizer",
        "optimizer._hp_optimizer_states_linked",
        "optimizer._lazy_init_hp_params_optimizer_state",
        "a_parameter._hp_mapping",
        "a_parameter._hp_mapping.optim_fragment",
    ],
    ("zero2_offload", "fp32"): [
        *(f"basic_optimizer.{each}" for each in ("ds_opt_adam", "opt_id", "ds_opt_adam.adam_update")),
        *(f"optimizer.{each}" for each in ("update_offload_overflow_tracker", "local_overflow", "_has_inf_or_nan")),
        *("optimizer.norm_for_param_grads", "optimizer.complete_grad_norm_calculation_for_cpu_offload"),
    ],
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


@pytest.mark.ranks
def test_an_engine_that_has_the_names_and_means_something_else_is_refused(refusals):
    assert "no fp32 tensor for each parameter at stage 0" in str(refusals["the masters"])
    assert "no error that says 'another text'" in str(refusals["the error of the loss scale"])


def operators() -> None:
    with builds_announced():
        internals.cpu_operators()


def launched() -> None:
    internals.launcher_options(["--hostfile", "hosts", "train.py"])


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("torch.utils.file_baton.FileBaton", operators),
        ("torch.utils.file_baton.FileBaton.try_acquire", operators),
        ("torch.utils.file_baton.FileBaton.wait", operators),
        ("torch.utils.file_baton.FileBaton.release", operators),
        ("deepspeed.ops.op_builder.cpu.CPUAdamBuilder", operators),
        ("deepspeed.ops.op_builder.cpu.ShareMemCommBuilder", operators),
        ("deepspeed.launcher.runner.parse_args", launched),
        ("deepspeed.constants.default_pg_timeout", internals.default_timeout),
    ],
)
def test_a_start_without_a_name_is_refused(monkeypatch, name, use):
    use()
    monkeypatch.delattr(name)
    library, last = name.partition(".")[0], name.rpartition(".")[2]
    with pytest.raises(InternalsError, match=rf"^{library} \d.* no {last}.*install {library}==\d"):
        use()


@pytest.mark.parametrize("module", ["deepspeed.launcher.runner", "deepspeed.launcher.launch"])
def test_a_launcher_that_moved_is_refused(monkeypatch, module):
    monkeypatch.setattr(internals, "find_spec", lambda name: None if name == module else util.find_spec(name))
    with pytest.raises(InternalsError, match=f"no module {module}, .*install deepspeed=="):
        demand_hostfile()


@pytest.mark.parametrize("name", ["user_script", "hostfile"])
def test_arguments_of_the_launcher_without_a_name_are_refused(monkeypatch, name):
    parse = runner.parse_args

    def renamed(arguments: list[str]) -> object:
        given = parse(arguments)
        delattr(given, name)
        return given

    monkeypatch.setattr(runner, "parse_args", renamed)
    with pytest.raises(InternalsError, match=f"has no {name}, .*install deepspeed=="):
        launched()


def test_a_lock_file_without_its_path_is_refused(monkeypatch):
    monkeypatch.setattr("torch.utils.file_baton.FileBaton.__init__", lambda self, path: None)
    with pytest.raises(InternalsError, match=r"has no lock_file_path, .*install torch=="):
        operators()


@pytest.mark.parametrize("module", ["_subclasses.fake_tensor", "utils._python_dispatch", "utils._pytree"])
def test_a_module_of_torch_that_moved_is_refused(monkeypatch, module):
    monkeypatch.setitem(sys.modules, f"torch.{module}", None)
    with pytest.raises(InputError, match=rf"torch\.{module} .*install torch=="):
        runpy.run_path(str(internals.__file__))


def test_the_error_of_a_loss_scale_at_its_minimum_is_recognised():
    scaler = DynamicLossScaler(1.0, 1, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    with pytest.raises(Exception, match="minimum") as error:
        scaler.update_scale(True)
    assert internals.is_scale_at_minimum(error.value)


def test_what_is_there_is_not_refused():
    internals.demand("torch", [], ("append", "pop"))
