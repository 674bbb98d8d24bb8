"""The planner's tables, and its arithmetic of model states against an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import launching
import pytest
import tiny
import torch
import yaml
from transformers import GPT2Config

from coconut_ds.commands import plan
from coconut_ds.config.batch_sizes import batch_sizes
from coconut_ds.config.resolved_run import resolve, with_micro_batch
from coconut_ds.config.rules import ConfigError, contradictions
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.memory.activations import ActivationCost
from coconut_ds.memory.model_states import bucket_note, model_states
from coconut_ds.model.backbone import ModelError
from coconut_ds.model.loading import load_backbone
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer
from coconut_ds.training.setup import load_setup
from coconut_ds.training.summary import opening

FP32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}


@pytest.fixture
def run_file(tmp_path) -> str:
    run = tiny.run(tmp_path) | {"num_epochs": 9, "batch_size_training": 4}
    return str(launching.write_run(run, tmp_path))


def test_a_plan_has_every_stage_and_every_file(run_file, capsys):
    assert plan.main(["--run", run_file, "--memory", "1.2"]) == 0
    printed = capsys.readouterr().out
    stages = [line.split() for line in printed.splitlines() if line[:5].strip().isdigit()]
    assert [row[:2] for row in stages] == [["0", "0"], ["1", "1"], ["2", "2"], ["3", "2"]]
    # More memory, larger micro-batches.
    assert plan.main(["--run", run_file, "--memory", "1.8"]) == 0
    larger = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert all(int(more[-1]) > int(less[-1]) > 0 for more, less in zip(larger, stages))
    for name in ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        assert f"ds_configs/{name}.json" in printed


def test_a_plan_leaves_room_for_cuda_nccl_and_fragments(run_file, capsys):
    assert plan.main(["--run", run_file, "--memory", "10.76"]) == 0
    printed = capsys.readouterr().out
    assert "\nCounted on are 9.36 GiB: 93% of what CUDA and NCCL leave, which take about 0.7.\n" in printed


def test_a_plan_names_the_faster_file(run_file, capsys):
    """The model is tiny: everything fits."""
    for file, expected in (("zero2_offload", "zero1"), ("zero1", None)):
        assert plan.main(["--run", run_file, "--memory", "10.76", f"deepspeed={file}"]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("faster: ")]
        assert [line.split()[1] for line in said] == ([f"ds_configs/{expected}.json"] if expected else [])


def test_what_a_plan_measures_is_a_card_s(run_file, monkeypatch, capsys):
    asked = []

    def measured(model, sequence, dtype, for_card) -> ActivationCost:
        asked.append((dtype, for_card))
        return ActivationCost(torch.tensor([2]), torch.tensor([3]))

    monkeypatch.setattr(plan, "measure", measured)
    for precision in ("fp16", "bf16", "fp32"):
        assert plan.main(["--run", run_file, "--memory", "10.76", f"precision={precision}"]) == 0, capsys.readouterr()
    assert list(dict.fromkeys(asked)) == [(torch.float16, True), (torch.bfloat16, True), (torch.float32, True)]


def test_recomputing_makes_room(run_file, capsys):
    largest = []
    for enabled in ("false", "true"):
        # Of a single layer everything is there again when its backward begins.
        changes = [f"activation_checkpointing.enabled={enabled}", "model.n_layer=3"]
        assert plan.main(["--run", run_file, "--memory", "1.2", *changes]) == 0
        stages = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
        largest.append(min(int(row[-1]) for row in stages))
    assert largest[1] > largest[0]


def test_what_is_wrong_ends_with_status_2(run_file, capsys):
    assert plan.main(["--run", run_file, "--memory", "11", "val_path=missing.json"]) == 2
    assert "error: missing.json: cannot be read" in capsys.readouterr().err


@pytest.fixture
def saved(run_file, tmp_path) -> Path:
    """A model and its tokenizer in a folder; the run's data are of its vocabulary."""
    records = json.loads((tmp_path / "prosqa_train.json").read_text())
    texts = [text for record in records for text in (record["question"], *record["steps"], record["answer"])]
    torch.manual_seed(0)
    tokenizer = word_tokenizer(texts, 64)
    backbone = scratch_backbone("llama", tokenizer, n_layer=2, n_embd=16, n_head=2, n_positions=64, dropout=0.0)
    backbone.model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def without(folder: Path, pattern: str) -> Path:
    """A copy of a folder without the files that fit."""
    shutil.copytree(folder, copy := folder.with_name("less"), ignore=shutil.ignore_patterns(pattern))
    return copy


@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
def test_a_config_without_weights_is_enough(run_file, saved, capsys, key):
    plans = []
    for folder in (saved, without(saved, "*.safetensors")):
        changes = ["model=null", f"{key}={folder}", *(["model_id=x"] if key == "load_model_path" else [])]
        assert plan.main(["--run", run_file, "--memory", "1.2", *changes]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert "largest micro-batch" in plans[0]


def test_a_checkpoint_without_its_weights_is_enough(run_file, saved, capsys, tmp_path):
    (tmp_path / "epoch_0001").mkdir()
    shutil.copytree(without(saved, "*.safetensors"), tmp_path / "epoch_0001" / "model")
    settings = {"latent_context": {"weights": [0.6, 0.4], "scope": "sequence", "learned": True}}
    (tmp_path / "epoch_0001" / "model" / "coconut.json").write_text(json.dumps(settings))
    changes = [f"load_model_path={tmp_path / 'epoch_0001'}", "model=null", "model_id=x", "latent_context.learned=true"]
    assert plan.main(["--run", run_file, "--memory", "1.2", *changes]) == 0, capsys.readouterr().err


def test_a_hub_id_of_which_only_the_config_is_in_the_cache(run_file, saved, capsys, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copytree(without(saved, "*.safetensors"), snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert plan.main(["--run", run_file, "--memory", "1.2", "model=null", "model_id=some/model"]) == 0
    assert "largest micro-batch" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_a_tokenizer_one_line_says_what_to_copy(run_file, saved, capsys, architecture):
    """For GPT-2 transformers makes an empty tokenizer, to which every text would be nothing."""
    folder = without(saved, "tokenizer*")
    if architecture == "gpt2":
        (folder / "config.json").write_text(GPT2Config(n_layer=1, n_embd=16, n_head=2).to_json_string())
    assert plan.main(["--run", run_file, "--memory", "1.2", "model=null", f"model_id={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: folder {folder} is not a model for transformers: no tokenizer (")
    assert line.endswith("copy tokenizer.json and tokenizer_config.json of the model beside its config.json")


def test_training_without_weights_stays_an_error(saved):
    with pytest.raises(ModelError, match=r"is not a model for transformers: .*no file named model.safetensors"):
        load_backbone(str(without(saved, "*.safetensors")))


def test_what_carries_no_coconut_is_refused_by_its_config(run_file, saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    for changes, said in (
        ({"architectures": ["T5Model"], "model_type": "t5"}, "Unrecognized configuration class"),
        ({"model_type": "none_such"}, "is not a model for transformers"),
    ):
        (saved / "config.json").write_text(json.dumps(config | changes))
        assert plan.main(["--run", run_file, "--memory", "1.2", "model=null", f"model_id={saved}"]) == 2
        assert said in capsys.readouterr().err


SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("zero", "world", "precision", "device", "host"),
    [
        # 16 bytes a parameter without ZeRO; weights, gradients and a master copy with it.
        ({"stage": 0}, 2, {}, 16, 0),
        ({"stage": 1, "reduce_bucket_size": 0}, 2, {}, 4 + 4 + 6, 0),
        ({"stage": 2, "reduce_bucket_size": 0}, 2, {}, 4 + 2 + 6, 0),
        ({"stage": 2, "reduce_bucket_size": 0}, 1, {"bf16": {"enabled": True}}, 2 + 2 + 12, 0),
        # Sums in fp32 stay on the card, also where the optimizer does not.
        ({"stage": 2, "reduce_bucket_size": 0}, 1, {"bf16": {"enabled": True}, **SUMS}, 2 + 4 + 12, 0),
        (
            {"stage": 2, "reduce_bucket_size": 0, "offload_optimizer": {"device": "cpu"}},
            1,
            {"bf16": {"enabled": True}, **SUMS},
            2 + 4 + 0.5,
            12 + 4,
        ),
        # On the card only the weights and the buffer of the largest parameter stay.
        ({"stage": 2, "reduce_bucket_size": 0, "offload_optimizer": {"device": "cpu"}}, 2, {}, 4 + 1, 6 + 2),
        ({"stage": 2, "reduce_bucket_size": 100, "overlap_comm": True}, 2, {}, 4 + 2 + 6 + 8 / 10, 0),
        # Of the weights half is a share, and all may be gathered.
        ({"stage": 3, "reduce_bucket_size": 0, "stage3_prefetch_bucket_size": 0}, 2, {}, 4 + 2 + 2 + 6, 0),
        (
            {"stage": 3, "reduce_bucket_size": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 250},
            2,
            {},
            1 + 2 + 2 + 6,
            0,
        ),
    ],
)
def test_bytes_per_parameter(zero, world, precision, device, host):
    states = model_states({"zero_optimization": zero, **FP32, **precision}, 1000, 250, world)
    assert (states.device / 1000, states.host / 1000) == (device, host)


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (
            {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True},
            'z.json has reduce_bucket_size 500,000,000, which takes 3.73 GiB; write "reduce_bucket_size": "auto" '
            "(50,000,000 elements, 0.37 GiB) in zero_optimization",
        ),
        (
            {"stage": 2, "reduce_bucket_size": 300_000_000},
            'z.json has reduce_bucket_size 300,000,000, which takes 1.12 GiB; write "reduce_bucket_size": "auto"',
        ),
        (
            {"stage": 3, "reduce_bucket_size": 5, "stage3_prefetch_bucket_size": 2**30},
            "z.json has stage3_prefetch_bucket_size 1,073,741,824, which takes 4.00 GiB",
        ),
        # It cuts what is sent and is no buffer.
        ({"stage": 2, "reduce_bucket_size": 5}, None),
        ({"stage": 2, "reduce_bucket_size": 5, "allgather_bucket_size": 2**33}, None),
        ({"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": "auto"}, None),
        ({"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}, None),
        ({"stage": 1}, None),
        ({"stage": 2, "overlap_comm": True}, None),
        ({"stage": 3}, None),
        ({"stage": 0}, None),
        ({}, None),
    ],
)
def test_buckets_that_cost_are_named_with_what_to_write(tmp_path, run_file, capsys, zero, said):
    file = tmp_path / "z.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = load_run_config(run_file)
    run = with_micro_batch(resolve(config, {"zero_optimization": zero}, plan._CARD, 1), 4)
    resolved = run.ds_config
    note = bucket_note(resolved, "z.json")
    assert (said is None and note is None) or said in note
    at_start = opening(run, load_setup(config, None, run.checkpointing), (1, 1))
    shown = [line for line in at_start.splitlines() if line.startswith("  buckets   ")]
    assert shown == ([f"  buckets   {bucket_note(resolved, config.deepspeed)}"] if said else [])
    if said and "overlap_comm" in zero:
        page = (launching.ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
        assert f"\nbuckets: {bucket_note(resolved, 'ds.json')}\n" in page
        assert plan.main(["--run", run_file, "--memory", "11", f"deepspeed={file}"]) == 0
        assert f"buckets: {bucket_note(resolved, str(file))}" in capsys.readouterr().out


@pytest.mark.ranks
def test_an_engine_holds_what_the_arithmetic_says():
    code = "import rank_checks\nresult = [rank_checks.states_against_engine(*case) for case in cases]"
    names = ("zero0", "zero1", "zero2", "zero2_offload")
    cases = [(name, lora) for lora in (False, True) for name in names]
    for outcomes in launching.on_ranks(2, code, cases=cases):
        for case, (held, predicted) in zip(cases, outcomes, strict=True):
            # Partitions are padded to whole blocks.
            assert held == pytest.approx(predicted, rel=0.02), case


@pytest.mark.ranks
def test_batch_sizes_are_found_through_the_entry(run_file, tmp_path):
    raw = json.loads((launching.ROOT / "ds_configs" / "zero2.json").read_text())
    raw["activation_checkpointing"] = {"cpu_checkpointing": False}
    zero = tmp_path / "zero2_block.json"
    zero.write_text(json.dumps(raw))
    run = yaml.safe_load(Path(run_file).read_text()) | {
        "save_path": str(tmp_path),
        "name": "auto",
        "num_epochs": 2,
        "batch_size_training": "auto",
        "train_batch_size": 4,
        "eval_batch_size": "auto",
        "log_every_steps": 2,
        "deepspeed": str(zero),
        "debug": True,
    }
    output = launching.train(run, tmp_path, 2)
    # The model is tiny: everything fits.
    assert "batch_size_training: auto is 2: 2 x 1 accumulated x 2 ranks" in output
    assert "eval_batch_size: auto is 4" in output
    resolved = yaml.safe_load((tmp_path / "auto" / "run_config.yaml").read_text())
    assert resolved["batch_size_training"] == 2
    assert resolved["activation_checkpointing"] == {"enabled": True, "every_n_layers": 1, "offload": False}
    # 8 examples, 4 a step: two steps an epoch, every second one recorded.
    assert [event["step"] for event in launching.events(tmp_path / "auto", "train_step")] == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": None}, "batch_size_training: auto needs train_batch_size"),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, "with batch_size_training: auto; leave it out"),
        ({"train_batch_size": 3}, "train_batch_size: 3 cannot be made from"),
    ],
)
def test_auto_needs_the_examples_of_a_step(changes, message):
    config = RunConfig(batch_size_training="auto", train_path="t", val_path="v", coconut=True, **changes)
    problems = [problem.message for problem in contradictions(config)]
    if not problems:
        with pytest.raises(ConfigError) as error:
            batch_sizes(config, world=2)
        problems = [str(error.value)]
    assert any(message in problem for problem in problems), problems
