"""A run is resolved once: nothing that is left to `auto` is read later, or has the type of what is settled."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from launching import ROOT

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import Device
from coconut_ds.config.ds_json import DeepSpeedConfigError
from coconut_ds.config.resolved_run import ResolvedRun, resolve, with_micro_batch
from coconut_ds.config.run_config import RunConfig

GPU = Device("cuda", has_bf16=True, has_fp16=True)
ALL_AUTO = {"batch_size_training": "auto", "train_batch_size": 24, "eval_batch_size": "auto", "precision": "auto"}
OPEN_KEYS = {"batch_size_training", "gradient_accumulation_steps", "eval_batch_size", "precision"}
OPEN_KEYS |= {"bf16", "activation_checkpointing"}
"""Keys whose value in the run file is not yet the one that is used."""


def draft(ds_json: dict | None = None, **values):
    return resolve(RunConfig(method="coconut", **values), ds_json or {}, GPU, world=2, run_file="run.yaml")


def test_a_draft_knows_everything_but_the_measured_micro_batch():
    found = draft({"activation_checkpointing": {"cpu_checkpointing": True}}, **ALL_AUTO)
    assert not found.is_measured
    assert not isinstance(found, ResolvedRun)
    assert (found.precision, found.eval_rows, found.checkpointing.offload) == ("bf16", None, True)
    run = with_micro_batch(found, 4)
    assert run.sizes == BatchSizes(4, 3, 2)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [run.ds_config[key] for key in sizes] == [24, 4, 3]
    assert "auto" not in str([run.ds_config, run.sizes, run.precision, run.checkpointing])


def test_what_is_recorded_has_the_numbers_and_leaves_open_what_depends_on_the_machine():
    asked = RunConfig(method="coconut", **ALL_AUTO)
    recorded = with_micro_batch(resolve(asked, {}, GPU, 2), 4).config.model_dump()
    differing = {key for key, value in asked.model_dump().items() if recorded[key] != value}
    assert differing == {"batch_size_training", "activation_checkpointing"}
    assert list(recorded) == list(asked.model_dump()), "run_config.yaml keeps the order of its keys"
    assert asked.batch_size_training == "auto", "the run file's values stay as they were"


def test_a_stated_micro_batch_settles_the_run_as_it_is():
    found = draft(batch_size_training=4, gradient_accumulation_steps=3, eval_batch_size=5)
    run = with_micro_batch(found, found.sizes.micro)
    assert found.is_measured
    assert (run.sizes, run.ds_config, run.config, run.eval_rows) == (found.sizes, found.ds_config, found.config, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.sizes = BatchSizes(1, 1, 1)


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_a_deepspeed_file_cannot_state_what_is_to_be_measured(key):
    with pytest.raises(DeepSpeedConfigError, match=f"{key}: 1 here, but 'auto' follows from run.yaml"):
        draft({key: 1}, **ALL_AUTO)
    assert draft({key: "auto", "train_batch_size": 24}, **ALL_AUTO)


def read_of_configurations(path: Path) -> set[str]:
    """Attributes read in the form `config.KEY` or `something.config.KEY`."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if re.search(r"\bconfig$|\basked$", ast.unparse(node.value))}


def test_keys_that_may_be_left_open_are_read_where_they_are_resolved():
    for path in (ROOT / "coconut_ds").rglob("*.py"):
        if path.parent.name != "config":
            assert not read_of_configurations(path) & OPEN_KEYS, path


def test_no_configuration_is_copied_with_changes():
    for path in (ROOT / "coconut_ds").rglob("*.py"):
        assert "model_copy" not in path.read_text(encoding="utf-8"), path
