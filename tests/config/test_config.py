"""RunConfig: published files load unchanged, overrides, and every problem reported together."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import yaml

from coconut_ds.config.batch_sizes import BatchSizes, batch_sizes
from coconut_ds.config.deepspeed_file import MEMORY_KEYS, OWNED_KEYS
from coconut_ds.config.foreign_keys import _TEXTS
from coconut_ds.config.rules import ConfigError
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import _SECTIONS, _describe, _sections_of, load_run_config
from coconut_ds.errors import InputError, plain_spelling

# Keys and spellings of the published `args/*.yaml`: numbers tagged as floats, null written None.
PUBLISHED = """
project: coconut
save_path: checkpoints
name: some-run
only_eval: False
coconut: {coconut}
cot: {cot}
no_thoughts: False
no_cot: False
c_thought: {c_thought}
epochs_per_stage: {epochs_per_stage}
max_latent_stage: {max_latent_stage}
pad_latent_to_max: True
save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: None
seed: 0
resume: 0
bf16: False
train_path: data/prosqa_train.json
val_path: data/prosqa_valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 50
lr: {lr}
weight_decay: 0.01
"""
COCONUT = dict(coconut=True, cot=False, c_thought=1, epochs_per_stage=5, max_latent_stage=6, lr='!!float "1e-4"')
COT = dict(coconut=False, cot=True, c_thought=0, epochs_per_stage=1, max_latent_stage=0, lr='!!float "1e-4"')


def load(tmp_path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run_config(path, overrides)


def problems(tmp_path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return [problem.message for problem in caught.value.problems]


GOOD = yaml.safe_dump({"coconut": True, "train_path": "a.json", "val_path": "b.json", "num_epochs": 4})


@pytest.mark.parametrize(("values", "method"), [(COCONUT, "coconut"), (COT, "cot")])
def test_published_files_load_unchanged(tmp_path, values, method):
    config = load(tmp_path, PUBLISHED.format(**values))
    assert config.method == method
    assert config.lr == 1e-4
    assert config.load_model_path is None
    assert config.reset_optimizer == "stage"
    assert config.c_thought == values["c_thought"]
    assert config.num_epochs == 50
    assert config.latent_context is None
    assert set(yaml.safe_load(PUBLISHED.format(**values))) <= set(RunConfig.model_fields)


def test_a_number_that_yaml_reads_as_text(tmp_path):
    assert yaml.safe_load("lr: 1e-4") == {"lr": "1e-4"}
    assert load(tmp_path, GOOD + "lr: 1e-4\n").lr == 1e-4


def test_overrides_reach_into_sections(tmp_path):
    config = load(tmp_path, GOOD, "lr=2e-5", "latent_context.weights=[0.5, 0.5]", "name=other", "reset_optimizer=epoch")
    assert config.lr == 2e-5
    assert config.latent_context.weights == (0.5, 0.5)
    assert config.name == "other"
    assert config.reset_optimizer == "epoch"
    assert load(tmp_path, GOOD, "latent_context=null").latent_context is None


def test_what_is_dumped_loads_again(tmp_path):
    config = load(tmp_path, GOOD, "latent_context.scope=last_pass", "reset_optimizer=true", "wandb=offline")
    assert load(tmp_path, config.to_yaml()) == config


def test_all_problems_come_together_with_key_value_rule_and_nearest_name(tmp_path):
    text = """
coconut: true
cot: true
learning_rat: 1
epochs_per_stag: 3
num_epochs: many
uniform_prob: 1.5
latent_context: {weights: [0, 1], scoop: last_pass}
val_path: b.json
"""
    found = problems(tmp_path, text, "nonsense")
    assert len(found) == 9
    joined = "\n".join(found)
    for expected in (
        "epochs_per_stag: unknown key (did you mean 'epochs_per_stage'?)",
        "learning_rat: unknown key",
        "num_epochs: 'many': input should be a valid integer",
        "uniform_prob: 1.5: input should be less than or equal to 1",
        "latent_context.weights: [0, 1]: needs at least one weight, the first above 0",
        "latent_context.scoop: unknown key (did you mean 'scope'?)",
        "train_path: missing",
        "cot, coconut: only one of them can be true",
        "'nonsense': an override is written key=value",
    ):
        assert expected in joined


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("coconut=false", "method: missing, and cot, no_cot, no_thoughts, coconut are all false"),
        ("no_cot=true", "no_cot, coconut: only one of them can be true"),
        ("c_thought=0", "c_thought: 0 with coconut"),
        ("epochs_per_stage=0", "epochs_per_stage: 0: must be a whole number of at least 1, or a list of them"),
        ("epochs_per_stage=[6, 0]", "epochs_per_stage: [6, 0]: must be a whole number of at least 1, or a list"),
        ("model.n_layer=2", "model: describes a model from scratch"),
        ("model_id=scratch", "needs a `model:` section"),
        ("resume=3", "needs load_model_path"),
        ("train_batch_size=33", "train_batch_size: 33 must be a multiple of batch_size_training (32)"),
        ("adam_betas=[0.9, 1.0]", "adam_betas: [0.9, 1.0]: each must be at least 0 and below 1"),
        ("only_eval=true", "only_eval: needs load_model_path"),
        ("eval_thoughts=6", "eval_thoughts: 6 is for the evaluation of a model with thoughts"),
        ("bf16=true precision=fp16", "bf16: true, but precision is fp16"),
        ("load_model_path=x resume=4", "resume: 4 leaves nothing to train, num_epochs is 4"),
        ("coconut=false cot=true latent_context.scope=sequence", "latent_context: cot has no continuous thoughts"),
        ("model_id=scratch model.n_embd=30 model.n_head=4", "model.n_embd: 30 must be a multiple of model.n_head (4)"),
    ],
)
def test_contradictions(tmp_path, override, message):
    assert any(message in found for found in problems(tmp_path, GOOD, *override.replace(", ", ",").split()))


def test_without_thoughts_beside_coconut_is_what_the_paper_calls_it(tmp_path):
    assert load(tmp_path, GOOD, "no_thoughts=true").method == "no_thoughts"


@pytest.mark.parametrize(
    ("override", "weights"),
    [
        ("latent_context.weights=[2, 1]", (2.0, 1.0)),
        ("latent_context.weights=uniform latent_context.window=4", (1.0, 1.0, 1.0, 1.0)),
        ("latent_context.weights=exponential latent_context.window=3", (1.0, 0.5, 0.25)),
        ("latent_context.weights=exponential latent_context.window=2 latent_context.decay=0.1", (1.0, 0.1)),
        ("latent_context.learned=true latent_context.window=3", (0.6, 0.3, 0.1)),
    ],
)
def test_windows(tmp_path, override, weights):
    config = load(tmp_path, GOOD, *override.replace(", ", ",").split())
    assert config.latent_context.newest_first == weights
    assert load(tmp_path, config.to_yaml()).latent_context == config.latent_context


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("latent_context.weights=uniform", "weights: uniform needs window, the number of states"),
        ("latent_context.window=2", "window: 2, but [0.6, 0.3, 0.1] has 3 weights; list that number"),
        ("latent_context.decay=0.3", "decay: belongs to weights: exponential"),
        ("latent_context.weights=[1] latent_context.learned=true", "learned: needs two weights or more"),
        ("latent_context.weights=[1,.nan]", "input should be a finite number"),
        (
            "coconut=false method=icot icot.tokens_per_stage=.inf",
            "icot.tokens_per_stage: inf: input should be a finite",
        ),
        ("latent_context.weights=[1,0] latent_context.learned=true", "learned: needs two weights or more, all above 0"),
        (
            "latent_context.weights=triangular",
            "latent_context.weights: 'triangular': must be a list of numbers, uniform or exponential",
        ),
        ("latent_context.window=0", "latent_context.window: 0: input should be greater than or equal to 1"),
        (
            "latent_context.weights=exponential latent_context.decay=2",
            "latent_context.decay: 2: input should be less than or equal to 1",
        ),
        ("latent_norm=l2", "latent_norm: 'l2': input should be 'none', 'rms' or 'embedding'"),
        ("method=paws", "method: 'paws': input should be 'coconut', 'cot'"),
        ("method=no_cot", "coconut: true, but method is no_cot"),
        ("coconut=false method=pause max_latent_stage=0", "max_latent_stage: 0 with pause"),
        ("coconut=false method=no_curriculum max_latent_stage=0", "max_latent_stage: 0 with no_curriculum"),
        ("coconut=false method=pause c_thought=0", "c_thought: 0 with pause: use method: no_cot"),
        ("coconut=false method=pause_as_thought c_thought=0", "c_thought: 0 with pause_as_thought: use method: no_tho"),
        ("coconut=false method=pause latent_norm=rms", "latent_norm: pause has no continuous thoughts"),
        ("coconut=false method=pause_as_thought latent_context.scope=sequence", "latent_context: pause_as_thought has"),
        (
            "coconut=false method=icot uniform_prob=0.1",
            "uniform_prob: 0.1 draws stages, and icot does not",
        ),
        (
            "coconut=false method=pause supervision.distill=true",
            "supervision.distill: pause has no continuous thoughts",
        ),
        (
            "supervision.distill.layers=[-1]",
            "supervision.distill.layers.0: -1: input should be greater than or equal to 0",
        ),
        (
            "coconut=false method=cot supervision.mixture.direct=1",
            "supervision.mixture: cot has no thoughts or pauses to",
        ),
        ("supervision.distill=true supervision.mixture.verbal=1", "set its alpha and beta instead"),
        ("supervision.mixture.latent=0", "supervision.mixture: all weights are 0; leave one above it"),
        ("supervision.distill.layers=[]", "supervision.distill.layers: []: tuple should have at least 1 item"),
        ("supervision.distill.layers=[1,1]", "supervision.distill.layers: [1, 1]: names a layer twice"),
        ("coconut=false method=codi supervision=false", "off with codi, which then is method: no_curriculum"),
        ("coconut=false method=codi supervision.distill=false", "off with codi, which then is method: no_curriculum"),
        ("coconut=false method=codi pad_latent_to_max=false", "c_thought * max_latent_stage, is fixed; leave it out"),
        ("curriculum=reversed save_only_improve=true", "is one with these steps given; set it to false"),
        ("coconut=false method=cot curriculum=reversed", "cot does not replace them by stage; leave it out"),
        ("icot.smoothing=1", "icot: a section for method: icot, but method is coconut"),
        ("coconut=false method=icot icot.smoothing=0", "icot.smoothing: 0: input should be greater than 0"),
        ("coconut=false method=icot icot.tokens=3", "icot.tokens: unknown key"),
    ],
)
def test_windows_and_methods_that_cannot_be(tmp_path, override, message):
    assert any(message in found for found in problems(tmp_path, GOOD, *override.split()))


def test_codi_has_its_teacher_and_a_fixed_number_of_thoughts(tmp_path):
    config = load(tmp_path, GOOD, "coconut=false", "method=codi", "supervision.steps=true", "max_latent_stage=1")
    assert config.pad_latent_to_max
    assert config.loss_weights == (1.0, 1.0, 1.0, 1.0, 0.0)
    off = load(tmp_path, GOOD, "supervision.distill={alpha: 0, gamma: 0, beta: 0.5}")
    assert off.distillation is None
    assert off.loss_weights == (1.0, 0.0, 0.0, 0.0, 0.0)
    mixed = load(tmp_path, GOOD, "supervision.mixture={latent: 0.5, verbal: 0.25, direct: 2}")
    assert mixed.loss_weights == (0.5, 0.0, 0.25, 0.0, 2.0)


def test_the_published_switches_are_synonyms(tmp_path):
    for name in ("coconut", "cot", "no_cot", "no_thoughts"):
        text = GOOD.replace("coconut: true", f"{name}: true")
        assert load(tmp_path, text).method == name
        assert load(tmp_path, text.replace("true", '"true"')).method == name
        assert load(tmp_path, text, f"method={name}").method == name
        assert load(tmp_path, GOOD.replace("coconut: true", f"method: {name}")).method == name


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "must hold `key: value` lines"), ("a: [", "is not YAML"), (None, "cannot be read")]
)
def test_files_that_are_no_run(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_run_config(path)


def test_batch_sizes_are_worked_out():
    def sizes(world: int, **values) -> BatchSizes:
        return batch_sizes(RunConfig(**values), world)

    assert sizes(2, batch_size_training=8, train_batch_size=128) == BatchSizes(8, 8, 2)
    assert sizes(2, batch_size_training=8, gradient_accumulation_steps=3) == BatchSizes(8, 3, 2)
    assert sizes(1, batch_size_training=8) == BatchSizes(8, 1, 1)
    with pytest.raises(ConfigError, match="128 cannot be made from 8 per micro-batch x 3 ranks"):
        sizes(3, batch_size_training=8, train_batch_size=128)
    with pytest.raises(ConfigError, match="128 cannot be made from 8 per micro-batch x 2 accumulated x 2 ranks"):
        sizes(2, batch_size_training=8, train_batch_size=128, gradient_accumulation_steps=2)


def misspelt(key: str) -> set[str]:
    """A letter missing, doubled or swapped with its neighbour; other case; underscores left out or otherwise."""
    found = {key.upper(), key.title(), key.replace("_", ""), key.replace("_", "-"), f"{key}_", f"_{key}"}
    for place in range(len(key)):
        found |= {key[:place] + key[place + 1 :], key[: place + 1] + key[place:]}
        found.add(key[:place] + key[place : place + 2][::-1] + key[place + 2 :])
    return found - {key, ""}


KEYS = [(section, key) for section, fields in (("", RunConfig), *_SECTIONS.items()) for key in fields.model_fields]


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_misspelt_key_gets_the_key_it_is(section, key):
    fields = _SECTIONS.get(section, RunConfig).model_fields
    # Without one letter a key can be another one: icot, cot.
    for name in misspelt(key) - set(fields):
        location = (section, name) if section else (name,)
        said = _describe({"loc": location, "type": "extra_forbidden"}).message
        assert said == f"{'.'.join(location)}: unknown key (did you mean {key!r}?)"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("max_size", "here it is train_size, beside val_size and test_size"),
        ("debug_val_size", "here it is val_size, or test_size with only_eval"),
        ("question_column", "here it is columns"),
        ("step_delimiter", "here it is steps_separator"),
        ("num_eval_samples", "here it is val_size"),
        ("alpha", "here it is supervision.distill, with alpha, beta and gamma"),
        ("gamma", "here it is supervision.distill, with alpha, beta and gamma"),
        ("ref_loss_factor", "here it is supervision.distill.alpha"),
        ("multi_mode", "here it is supervision.mixture"),
        ("distributed_training", "deepspeed --num_gpus N, or RANKS=N ./launch.sh"),
        ("max_length", "an example longer than the model's positions is named"),
        ("max_seq_length", "an example longer than the model's positions is named"),
        ("stage_0_epochs", "[6, 3] trains stage 0 for 6 epochs"),
        ("reversed", "here it is curriculum: reversed"),
        ("replacement_method", "latent_context and latent_norm"),
        ("torch_compile", "the model is not compiled"),
        ("gradient_checkpointing", "here it is activation_checkpointing"),
        ("use_lora", "here it is lora: true, or with r"),
        ("learning_rate", "here it is lr"),
        ("per_device_train_batch_size", "here it is batch_size_training"),
        ("per_device_eval_batch_size", "here it is eval_batch_size"),
        ("num_train_epochs", "here it is num_epochs"),
        ("warmup_ratio", "set warmup_steps, in optimizer steps"),
        ("lr_scheduler_type", "here it is lr_schedule: constant, linear or cosine"),
        ("output_dir", "the run folder is save_path/name"),
        ("fp16", "set precision: fp16"),
        ("max_steps", "set num_epochs"),
        ("logging_steps", "here it is log_every_steps"),
        ("save_steps", "here it is save_every_steps"),
        ("micro_batch_size", "here it is batch_size_training"),
        ("sequence_len", "nothing is cut"),
        ("base_model", "here it is model_id"),
        ("LearningRate", "here it is lr"),
    ],
)
def test_keys_of_other_trainers_get_what_to_set_here(tmp_path, key, said):
    (found,) = problems(tmp_path, GOOD, f"{key}=1")
    assert found.startswith(f"{key}: unknown key; ")
    assert said in found


def test_what_a_key_of_another_trainer_is_sent_to_is_there(tmp_path):
    ours = {f"{section}.{key}" if section else key for section, key in KEYS}
    ours |= {f"ds.{key}" for key in (*MEMORY_KEYS, *OWNED_KEYS)}
    assert not set(map(plain_spelling, ours)) & set(_TEXTS)
    for text in _TEXTS.values():
        if named := re.match(r"here it is ([\w.]+)", text):
            *sections, key = named[1].split(".")
            fields = functools.reduce(lambda section, name: _sections_of(section)[name], sections, RunConfig)
            assert key in fields.model_fields


@pytest.mark.parametrize("key", "base_path min_new_tokens max_seq_tokens loss bf32 beam_size train_bits x".split())
def test_other_words_get_no_hint(tmp_path, key):
    assert problems(tmp_path, GOOD, f"{key}=1") == [f"{key}: unknown key"]


@pytest.mark.parametrize("off", ["false", "off", "no", "False", "null", "None", "disabled", "Disabled", "0", '"false"'])
def test_what_yaml_reads_as_off_is_off(tmp_path, off):
    config = load(tmp_path, GOOD + f"wandb: {off}\ntensorboard: {off}\n")
    assert (config.wandb, config.tensorboard) == ("disabled", False)
    config = load(tmp_path, GOOD, f"wandb={off}", f"tensorboard={off}")
    assert (config.wandb, config.tensorboard) == ("disabled", False)
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize("on", ["true", "on", "yes", "True", "1"])
def test_what_yaml_reads_as_on_is_on(tmp_path, on):
    config = load(tmp_path, GOOD, f"wandb={on}", f"tensorboard={on}")
    assert (config.wandb, config.tensorboard) == ("online", True)
    assert load(tmp_path, GOOD, "wandb=Offline").wandb == "offline"


def test_parts_of_a_run_are_switched_off_by_false(tmp_path):
    off = "latent_context icot shuffle_facts save_every_steps keep_checkpoints latent_norm".split()
    off += "load_model_path precision max_grad_norm".split()
    config = load(tmp_path, GOOD, *(f"{key}=off" for key in off))
    assert config == load(tmp_path, GOOD)
    assert load(tmp_path, GOOD, "activation_checkpointing=true").activation_checkpointing.enabled
    # Off, and not left to the DeepSpeed file.
    assert load(tmp_path, GOOD, "activation_checkpointing=no").activation_checkpointing.enabled is False


def test_words_that_are_no_switch_are_refused(tmp_path):
    assert problems(tmp_path, GOOD, "wandb=sometimes") == [
        "wandb: 'sometimes': input should be 'online', 'offline' or 'disabled'"
    ]
    assert problems(tmp_path, GOOD, "tensorboard=offline")[0].startswith("tensorboard: 'offline': input should be a")


@pytest.mark.parametrize(
    ("typo", "key"),
    [
        ("gradiant_accumalation_steps", "gradient_accumulation_steps"),
        ("max_latant_stege", "max_latent_stage"),
        ("lr_schedular", "lr_schedule"),
        ("training_path", "train_path"),
    ],
)
def test_several_letters_of_a_long_key_may_be_mistyped(tmp_path, typo, key):
    with pytest.raises(ConfigError, match=f"{typo}: unknown key .did you mean '{key}'"):
        load(tmp_path, GOOD, f"{typo}=1")


def test_other_words_for_off(tmp_path):
    assert load(tmp_path, GOOD, "latent_norm=None").latent_norm == "none"
    assert load(tmp_path, GOOD, "max_grad_norm=null").max_grad_norm == 0
    for word in ("null", "none", "None", "false"):
        assert load(tmp_path, GOOD, f"reset_optimizer={word}").reset_optimizer is False


def test_a_list_of_epochs_is_written_and_read_back(tmp_path):
    config = load(tmp_path, GOOD, "epochs_per_stage=[6, 3]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_run_config(tmp_path / "again.yaml").epochs_per_stage == config.epochs_per_stage == (6, 3)
