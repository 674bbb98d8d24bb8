"""The DeepSpeed configuration: "auto" resolved, clashes and known-bad combinations refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coconut_ds.config.batch_sizes import BatchSizes
from coconut_ds.config.deepspeed_config import (
    Device,
    ignored_note,
    offloads_optimizer,
    resolve_checkpointing,
    resolve_ds_config,
    resolve_precision,
)
from coconut_ds.config.ds_json import DeepSpeedConfigError, read_ds_json, shipped_ds_jsons
from coconut_ds.config.run_config import RunConfig
from coconut_ds.memory.model_states import bucket_note, model_states

ROOT = Path(__file__).resolve().parents[2]
SIZES = BatchSizes(4, 2, 2)
CPU = Device("cpu", has_bf16=True, has_fp16=False)
TURING = Device("cuda", has_bf16=False, has_fp16=True)
AMPERE = Device("cuda", has_bf16=True, has_fp16=True)

# As people write it for the HF Trainer.
HF_TRAINER = read_ds_json(str(ROOT / "tests" / "golden" / "hf_trainer.json"))


def resolve(raw: dict, device: Device = CPU, **values) -> dict:
    return resolve_ds_config(raw, RunConfig(deepspeed="z.json", **values), SIZES, device, "run.yaml")


def problem_with(raw: dict, device: Device = CPU, **values) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        resolve(raw, device, **values)
    return str(caught.value)


def has_auto(value) -> bool:
    return value == "auto" or (isinstance(value, dict) and any(map(has_auto, value.values())))


def test_a_json_written_for_the_hf_trainer_works():
    resolved = resolve(HF_TRAINER, max_grad_norm=1.0)
    assert not has_auto(resolved)
    assert resolved["train_batch_size"] == 16
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["fp16"] == {"enabled": False, "loss_scale": 0, "initial_scale_power": 16}
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert not {"optimizer", "scheduler"} & set(resolved)
    assert offloads_optimizer(resolved)


@pytest.mark.parametrize(
    ("precision", "accumulation", "stage", "sums"),
    [("bf16", 2, 2, "fp32"), ("bf16", 1, 2, None), ("bf16", 2, 0, None), ("fp16", 2, 2, None), ("fp32", 2, 2, None)],
)
def test_bf16_gradients_of_several_micro_batches_are_summed_in_fp32(precision, accumulation, stage, sums):
    raw, sizes = {"zero_optimization": {"stage": stage}}, BatchSizes(2, accumulation, 1)
    resolved = resolve_ds_config(raw, RunConfig(precision=precision), sizes, AMPERE)
    assert resolved.get("data_types", {}).get("grad_accum_dtype") == sums
    own = resolve_ds_config(
        raw | {"data_types": {"grad_accum_dtype": "bf16"}}, RunConfig(precision="bf16"), sizes, AMPERE
    )
    assert own["data_types"] == {"grad_accum_dtype": "bf16"}, "a file that says otherwise is followed"


def test_resolving_changes_nothing_in_its_input():
    before = json.dumps(HF_TRAINER)
    resolve(HF_TRAINER)
    assert json.dumps(HF_TRAINER) == before


def test_every_clash_is_named_with_both_files():
    raw = {
        **HF_TRAINER,
        "train_batch_size": 128,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Lion", "params": {"lr": 3e-4, "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
        "bf16": {"enabled": True},
    }
    message = problem_with(raw)
    assert message.startswith("z.json: 7 problems")
    for expected in (
        "train_batch_size: 128 here, but 16 follows from run.yaml",
        "gradient_clipping: 0.5 here, but 0.0 follows from run.yaml",
        "optimizer.type: 'Lion' here",
        "optimizer.params.lr: 0.0003 here, but 0.0001 follows",
        "optimizer.params.momentum: 0.9 here, but run.yaml owns training values",
        "scheduler.params.warmup_num_steps: 100 here",
        "bf16.enabled: True here, but False follows",
    ):
        assert expected in message


def test_equal_values_are_no_clash():
    assert resolve({"train_batch_size": 16, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("raw", "values", "device", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, {}, CPU, "unknown key, which DeepSpeed would ignore (did you mean"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            {},
            CPU,
            "partition_activations: True: refused: it divides activations among model-parallel",
        ),
        (
            {"activation_checkpointing": {"number_checkpoints": 4}},
            {},
            CPU,
            "set activation_checkpointing.every_n_layers",
        ),
        ({"activation_checkpointing": {"cpu_chekpointing": True}}, {}, CPU, "did you mean 'cpu_checkpointing'"),
        ({"activation_checkpointing": {"cpu_checkpointing": 1.5}}, {}, CPU, "must be true or false"),
        ({"activation_checkpointing": True}, {}, CPU, "activation_checkpointing: True must be an object"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": False}},
            {"fast": "off"},
            CPU,
            "has fast: off, whose passes keep all activations; drop one of them",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": False}},
            {"activation_checkpointing": {"enabled": False}},
            CPU,
            "has activation_checkpointing.enabled: false; drop one of them",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            {"activation_checkpointing": {"offload": False}},
            CPU,
            "cpu_checkpointing: True here, but False follows from",
        ),
        ({"fp16": {"initial_scale_power": 1000}}, {}, CPU, "initial_scale_power: 1000: Input should be less than or"),
        ({"zero_optimization": {"stage": 0}}, {"precision": "fp16"}, TURING, "0 with fp16 trains on unscaled losses"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            CPU,
            "ignores it below stage 3",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}, CPU, "ignores it at stage 0"),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            {},
            CPU,
            "overlap_comm: true was never tried at stage 1",
        ),
        ({"zero_optimization": 2}, {}, CPU, "must be an object with a stage"),
        (
            {"zero_optimization": {"stage": 0, "cpu_offload": True}},
            {},
            CPU,
            'write offload_optimizer: {"device": "cpu"}',
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, {}, CPU, "write offload_param"),
        ({"zero_optimization": {"stage": 2, "strict": True}}, {}, CPU, "zero_optimization.strict: unknown key"),
        ({"data_types": None}, {}, CPU, "data_types: None must be an object"),
        ({"amp": {"enabled": True}}, {}, CPU, "amp: refused"),
        ({"optimizer": {"params": {"beta": "auto"}}}, {}, CPU, "optimizer.params.beta: unknown key (did you mean"),
        ({"zero_optimization": {"stage": 4}}, {}, CPU, "zero_optimization.stage: 4: must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}},
            {},
            CPU,
            "zero_optimization.reduce_bucket_sise: unknown key (did you mean 'reduce_bucket_size'?)",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin": True}}},
            {},
            CPU,
            "zero_optimization.offload_optimizer.pin: unknown key",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            {},
            CPU,
            "nvme is not supported",
        ),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, {}, CPU, "zero_optimization.reduce_bucket_size: 'big'"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, {}, CPU, "mics_shard_size: unknown key"),
        ({"gradient_checkpointing": True}, {}, CPU, "ignore; set activation_checkpointing in the run YAML"),
        ({"stage": 2}, {}, CPU, "stage: unknown key, which DeepSpeed would ignore; it belongs in zero_optimization"),
        ({"learning_rate": 1}, {}, CPU, "ignore; set lr, weight_decay or adam_betas in the run YAML"),
        ({"train_micro_batch_size_per_gpus": 4}, {}, CPU, "(did you mean 'train_micro_batch_size_per_gpu'?)"),
        ({"batch": 4}, {}, CPU, "1 problem\n  - batch: unknown key, which DeepSpeed would ignore"),
        ({"fp16": {"enable": True}}, {}, CPU, "fp16.enable: unknown key (did you mean 'enabled'?)"),
        ({"bf16": True}, {}, CPU, "bf16: True must be an object"),
        ({"data_types": {"grad_accum": "fp32"}}, {}, CPU, "data_types.grad_accum: unknown key, which DeepSpeed would"),
        ({"flops_profiler": {"enable": True}}, {}, CPU, "flops_profiler.enable: unknown key, which DeepSpeed would"),
        ({"aio": {"thread_count": 2}}, {}, CPU, "aio: refused: it is for NVMe"),
        ({"checkpoint": {"load_universal": True}}, {}, CPU, "checkpoint: refused: checkpoints are written by this"),
        *(
            (
                {
                    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                    "data_types": {"grad_accum_dtype": name},
                },
                {"precision": "fp16"},
                TURING,
                "never recovers from an overflow",
            )
            for name in ("fp32", "float32")
        ),
    ],
)
def test_refusals_give_a_reason(raw, values, device, message):
    assert message in problem_with(raw, device, **values)


@pytest.mark.parametrize(
    ("block", "values", "enabled", "offload"),
    [
        (None, None, False, False),
        ("auto", None, False, False),
        ({}, None, True, False),
        ({"cpu_checkpointing": True, "partition_activations": False, "number_checkpoints": None}, None, True, True),
        (None, {"every_n_layers": 2}, True, False),
        ({"cpu_checkpointing": "auto"}, {"offload": True}, True, True),
    ],
)
def test_a_checkpointing_block_is_translated(block, values, enabled, offload):
    raw = {} if block is None else {"activation_checkpointing": block}
    config = RunConfig(activation_checkpointing=values)
    assert "activation_checkpointing" not in resolve(raw, activation_checkpointing=values)
    settings = resolve_checkpointing(raw, config)
    assert (settings.enabled, settings.offload) == (enabled, offload)
    assert settings.every_n_layers == (values or {}).get("every_n_layers", 1)


@pytest.mark.parametrize(
    ("values", "device", "expected"),
    [
        ({}, CPU, "fp32"),
        ({"bf16": True}, CPU, "bf16"),
        ({"precision": "auto"}, CPU, "fp32"),
        ({"precision": "auto"}, TURING, "fp16"),
        ({"precision": "auto"}, AMPERE, "bf16"),
        ({"precision": "fp16"}, TURING, "fp16"),
    ],
)
def test_precision(values, device, expected):
    assert resolve_precision(RunConfig(**values), device) == expected


@pytest.mark.parametrize(("values", "device"), [({"bf16": True}, TURING), ({"precision": "fp16"}, CPU)])
def test_precision_the_device_lacks_is_refused(values, device):
    with pytest.raises(DeepSpeedConfigError, match="this device has none"):
        resolve_precision(RunConfig(**values), device)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("device", [CPU, TURING, AMPERE], ids=str)
def test_every_shipped_json_resolves(path, device):
    resolved = resolve(read_ds_json(path), device)
    assert not has_auto(resolved)
    zero = resolved["zero_optimization"]
    assert ("offload" in path.stem) is offloads_optimizer(resolved)
    assert f"zero{zero['stage']}" in path.stem
    buckets = {key: value for key, value in zero.items() if key.endswith("bucket_size")}
    assert len(buckets) == (2 if zero["stage"] else 0)
    assert all(2e7 <= size <= 5e7 for size in buckets.values())


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "JSON object")])
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "z.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DeepSpeedConfigError, match=message):
        read_ds_json(path)


def test_values_written_as_text_and_other_names_of_a_key_are_read_as_deepspeed_reads_them():
    raw = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "20000000",
            "prefetch_bucket_size": 1000,
            "overlap_comm": "false",
            "offload_optimizer": None,
        }
    }
    resolved = resolve_ds_config(raw, RunConfig(method="cot"), BatchSizes(1, 1, 1), Device("cuda", True, True))
    zero = resolved["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (20_000_000, 1000)
    assert zero["overlap_comm"] is False
    assert bucket_note(resolved, "a.json") is None
    assert model_states(resolved, 1000, 100, 1).device > 0


FOREIGN = {
    "comms_config": {"comms_logger_enabled": False},
    "monitor_config": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}},
    "zero_optimization": {"stage": 2, "round_robin_gradients": True},
}
"""Keys of the files of LLaMA-Factory and Latent-SFT."""


def test_keys_of_others_that_do_no_harm_are_left_out_and_named():
    resolved = resolve_ds_config(FOREIGN, RunConfig(method="cot"), BatchSizes(1, 1, 1), Device("cuda", True, True))
    assert not {"comms_config", "monitor_config", "optimizer"} & resolved.keys()
    assert "round_robin_gradients" not in resolved["zero_optimization"]
    assert ignored_note(FOREIGN, "z.json") == (
        "of z.json comms_config (DeepSpeed has no such section), monitor_config (DeepSpeed has no such section), "
        "optimizer.params.torch_adam (the optimizer is this trainer's AdamW), zero_optimization.round_robin_gradients "
        "(it is off, as DeepSpeed 0.19.8 then mixes up fp32 weights of ranks)"
    )
    assert ignored_note({"zero_optimization": {"stage": 2, "round_robin_gradients": False}}, "z.json") is None
    for name in shipped_ds_jsons():
        assert ignored_note(read_ds_json(name), name) is None


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 2}, {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}),
        ({"stage": 1, "reduce_bucket_size": 7}, {"reduce_bucket_size": 7, "allgather_bucket_size": 50_000_000}),
        ({"stage": 3}, {"reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 20_000_000}),
        ({"stage": 0}, {}),
    ],
)
def test_a_file_without_sizes_of_buckets_gets_small_ones(zero, expected):
    raw = {"zero_optimization": zero}
    resolved = resolve_ds_config(raw, RunConfig(method="cot"), BatchSizes(1, 1, 1), Device("cuda", True, True))
    assert resolved["zero_optimization"] == zero | expected


@pytest.mark.parametrize("typo", ["stage3_max_live_parameter", "stage3_prefetch_bucketsize"])
def test_a_misspelt_key_of_stage_3_gets_its_name(typo):
    raw = {"zero_optimization": {"stage": 3, typo: 5}}
    with pytest.raises(DeepSpeedConfigError, match=r"did you mean 'stage3_(max_live_parameters|prefetch_bucket_size)'"):
        resolve_ds_config(raw, RunConfig(method="cot"), BatchSizes(1, 1, 1), Device("cuda", True, True))
