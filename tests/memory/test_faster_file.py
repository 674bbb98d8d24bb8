"""Which shipped DeepSpeed file is named as the faster one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import Device, resolve_ds_config
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.resolved_run import resolve, with_micro_batch
from coconut_ds.config.run_config import RunConfig
from coconut_ds.memory.faster_file import faster_file
from coconut_ds.memory.model_states import Elements
from coconut_ds.training import session

CARD = Device("cuda", has_bf16=True, has_fp16=True)
TWO_RANKS = BatchSizes(32, 2, 2)
PARAMETERS = [10_000_000] * 10
GIB = 2**30


def named(file: str, budget: float = 8, sizes: BatchSizes = TWO_RANKS) -> str | None:
    config = RunConfig(method="coconut", deepspeed=f"ds_configs/{file}.json")
    resolved = resolve_ds_config(read_ds_json(config.deepspeed), config, sizes, CARD)
    return faster_file(config, resolved, sizes, CARD, Elements(PARAMETERS, 0), int(budget * GIB))


@pytest.mark.parametrize(
    ("file", "budget", "expected"),
    [
        # In fp32 on two ranks zero1 holds 1.49 GiB, zero2 1.30, zero2_offload 0.56.
        ("zero2_offload", 8, "zero1"),
        ("zero2_offload", 1.4, "zero2"),
        ("zero2_offload", 1, None),
        ("zero2_offload", -1, None),
        ("zero3", 8, "zero1"),
        ("zero3_offload", 8, "zero1"),
        ("zero3_offload", 1, "zero2_offload"),
        ("zero2", 8, "zero1"),
        ("zero1", 8, None),
        ("zero0", 8, None),
    ],
)
def test_the_file_with_the_least_to_copy_and_send_that_fits(file, budget, expected):
    said = named(file, budget)
    assert said is None if expected is None else said.startswith(f"ds_configs/{expected}.json fits too (")


def test_the_reasons_are_what_the_other_file_does_not_do():
    assert named("zero2_offload") == (
        "ds_configs/zero1.json fits too (1.49 of 8.00 GiB) and should be faster: it keeps optimizer states on the card "
        "(no copies over PCIe, no update on the host), and sends gradients once per step, not after every micro-batch"
    )
    assert named("zero3_offload", 1).endswith("faster: it does not gather the weights of each layer in each pass")


@pytest.mark.parametrize("sizes", [BatchSizes(32, 1, 2), BatchSizes(32, 4, 1)])
def test_stage_2_sends_no_more_than_stage_1_without_accumulation_or_other_ranks(sizes):
    assert named("zero2", sizes=sizes) is None
    assert "sends" not in named("zero2_offload", sizes=sizes)


def test_a_run_asks_on_a_gpu_only(monkeypatch):
    sizes = {"train_batch_size": 8, "batch_size_training": 4}
    config = RunConfig(method="coconut", deepspeed="ds_configs/zero2_offload.json", **sizes)
    run = with_micro_batch(resolve(config, read_ds_json(config.deepspeed), CARD, 1), 4)
    setup = SimpleNamespace(model=tiny.coconut())
    assert session._faster(run, setup, GIB) is None
    monkeypatch.setattr(session.distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(session, "describe_device", lambda: CARD)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 11 * GIB))
    assert session._faster(run, setup, GIB).startswith("ds_configs/zero1.json fits too (")
    assert session._faster(run, setup, 11 * GIB) is None
