"""Builds the parts of a run from its configuration and lets them work: training, or evaluation alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from coconut_ds import distributed
from coconut_ds.config import ActivationCheckpointingConfig, BatchSizes, RunConfig, batch_sizes
from coconut_ds.console import say
from coconut_ds.curriculum.collator import Tokens
from coconut_ds.curriculum.examples import check_lengths, longest_prompt, read_records, tokenize
from coconut_ds.curriculum.stages import Curriculum
from coconut_ds.engine.build import build_engine, start_process_group
from coconut_ds.engine.ds_config import Precision
from coconut_ds.errors import InputError
from coconut_ds.model.backbone import END_LATENT, LATENT, START_LATENT, Backbone, scratch_backbone, word_tokenizer
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.latents import LatentContext
from coconut_ds.tracking import Tracker, describe_environment, read_events, write_record
from coconut_ds.training.batch_size import choose_eval_batch, choose_micro_batch
from coconut_ds.training.checkpoint import Checkpoints
from coconut_ds.training.evaluator import Evaluation, Evaluator
from coconut_ds.training.trainer import Parts, Trainer, write_predictions
from coconut_ds.training.weights import latent_settings, load_initial, load_window, stored_settings

_DEBUG_TRAIN, _DEBUG_VALID = 5000, 32


@dataclass(frozen=True)
class Materials:
    """What a run trains and what on, read and checked."""

    curriculum: Curriculum
    backbone: Backbone
    model: Coconut
    tokens: Tokens
    train_set: Dataset
    valid_set: Dataset


def load_materials(config: RunConfig) -> Materials:
    """Read data and model; raises InputError for whatever is wrong with them."""
    train_path, val_path = str(config.train_path), str(config.val_path)
    train_records = read_records(train_path, _DEBUG_TRAIN if config.debug else None)
    valid_records = read_records(val_path, _DEBUG_VALID if config.debug else None)
    backbone = load_initial(config, lambda: _scratch(config, train_records))
    curriculum = Curriculum.of(config)
    train_set = _examples(train_path, train_records, backbone, curriculum, config.max_new_tokens)
    valid_set = _examples(val_path, valid_records, backbone, curriculum, config.max_new_tokens)
    model, tokens = _coconut(config, backbone)
    _demand_facts(config, tokens, train_set)
    return Materials(curriculum, backbone, model, tokens, train_set, valid_set)


def train(config: RunConfig, resolve: Callable[[RunConfig, BatchSizes], dict[str, Any]]) -> None:
    """Train a run to its end and print accuracy by stage; `resolve` makes the DeepSpeed configuration."""
    checkpoints = Checkpoints(config.run_folder, config.keep_checkpoints)
    if config.debug and checkpoints.found():
        raise InputError(f"debug: {config.run_folder} holds a run, whose records would be lost; set another name")
    torch.manual_seed(config.seed)
    start_process_group(config.hang_limit_s)
    newest = checkpoints.newest_intact()
    materials = load_materials(_going_on_from(newest, config))
    curriculum, backbone, model, tokens = materials.curriculum, materials.backbone, materials.model, materials.tokens
    world = distributed.world_size()
    if config.batch_size_training == "auto":
        provisional = resolve(config, batch_sizes(config, world))
        micro = choose_micro_batch(config, provisional, model, materials.train_set, curriculum, tokens)
        config = config.model_copy(update={"batch_size_training": micro})
    sizes = batch_sizes(config, world)
    ds_config = resolve(config, sizes)
    if distributed.is_main():
        _write_description(config, ds_config)
    # Ranks draw their own dropout from here on; weights and order were drawn from the seed they share.
    torch.manual_seed(config.seed + 1_000_003 * distributed.rank())
    engine = build_engine(model, config, ds_config)
    tracker = Tracker(config, distributed.is_main())
    evaluator = _evaluator(config, model, materials.valid_set, curriculum, tokens, backbone)
    say(_opening(config, sizes, ds_config, backbone, len(materials.train_set)))
    train_set = materials.train_set
    parts = Parts(
        config, sizes, curriculum, tokens, backbone, engine, train_set, evaluator, tracker, checkpoints, newest
    )
    try:
        is_complete = Trainer(parts).fit()
    finally:
        tracker.close()
    if not is_complete:
        place = "the start (debug saves nothing)" if config.debug else checkpoints.found()[-1]
        say(f"stopped as asked; the same command goes on from {place}")
        return
    say(summary_table(read_events(tracker.path, "eval")) if distributed.is_main() else "")
    say(f"run folder: {config.run_folder}")


def _going_on_from(newest: Path | None, config: RunConfig) -> RunConfig:
    """The configuration to load the model with: an interrupted run has its own weights."""
    if newest is None:
        return config
    say(f"going on from {newest}")
    if config.load_model_path:
        say(f"load_model_path {config.load_model_path} is not used: the run goes on from its own weights")
    return config.model_copy(update={"load_model_path": str(newest)})


def evaluate(config: RunConfig, precision: Precision) -> None:
    """Evaluate `load_model_path` on the test set, or on the validation set where no test set is named."""
    start_process_group(config.hang_limit_s)
    path = str(config.test_path or config.val_path)
    records = read_records(path, _DEBUG_VALID if config.debug else None)
    backbone = load_initial(config)
    curriculum = Curriculum.of(config)
    stage = _stage_to_evaluate(config, curriculum)
    examples = _examples(path, records, backbone, curriculum, config.max_new_tokens)
    model, tokens = _coconut(config, backbone)
    model.to(distributed.device(), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    evaluator = _evaluator(config, model, examples, curriculum, tokens, backbone)
    outcome = evaluator.run(stage)
    if outcome is None:
        return
    evaluation, predictions = outcome
    name = f"eval_{Path(path).stem}"
    write_predictions(config, name, predictions)
    say(_evaluation_text(config, path, stage, evaluation))
    say(f"predictions: {config.run_folder / 'predictions' / name}.jsonl")
    say(json.dumps({"path": str(path), "stage": stage, **evaluation.as_dict()}))


def _scratch(config: RunConfig, records: list[dict[str, Any]]) -> Backbone:
    assert config.model is not None, "load_run_config demands a model section for model_id: scratch"
    shape = config.model.model_dump()
    texts = (text for record in records for text in (record["question"], *record["steps"], record["answer"]))
    tokenizer = word_tokenizer(texts, shape["n_positions"])
    return scratch_backbone(shape.pop("architecture"), tokenizer, **shape)


def _examples(
    path: str, records: list[dict[str, Any]], backbone: Backbone, curriculum: Curriculum, new_tokens: int
) -> Dataset:
    examples = tokenize(records, backbone.tokenizer)
    check_lengths(path, examples, curriculum, backbone.n_positions, new_tokens)
    return examples


def _evaluator(
    config: RunConfig, model: Coconut, examples: Dataset, curriculum: Curriculum, tokens: Tokens, backbone: Backbone
) -> Evaluator:
    rows = config.eval_batch_size
    if rows == "auto":
        rows = choose_eval_batch(model, longest_prompt(examples, curriculum), config.max_new_tokens, len(examples))
        say(f"eval_batch_size: auto is {rows}")
    return Evaluator(model, examples, curriculum, tokens, backbone.tokenizer, rows, config.max_new_tokens)


def _coconut(config: RunConfig, backbone: Backbone) -> tuple[Coconut, Tokens]:
    tokens = _tokens(config, backbone)
    model = Coconut(
        backbone.model,
        latent_token_id=tokens.thought,
        start_latent_id=tokens.start_latent,
        end_latent_id=tokens.end_latent,
        eos_token_id=backbone.tokenizer.eos_token_id,
        latent_context=_latent_context(config),
    )
    load_window(model, config.load_model_path)
    checkpointing = config.activation_checkpointing
    if checkpointing is not None and checkpointing.enabled and not config.only_eval:
        _checkpoint_activations(model, checkpointing)
    return model, tokens


def _latent_context(config: RunConfig) -> LatentContext:
    context = config.latent_context
    if context is None:
        return LatentContext(norm=config.latent_norm)
    return LatentContext(context.newest_first, context.scope, context.learned, config.latent_norm)


def _tokens(config: RunConfig, backbone: Backbone) -> Tokens:
    traits = config.traits
    ids = {} if traits.thoughts == "none" else backbone.marker_ids()
    return Tokens(
        pad=backbone.tokenizer.pad_token_id,
        start_latent=ids[START_LATENT] if traits.has_markers else None,
        end_latent=ids[END_LATENT] if traits.has_markers else None,
        latent=ids.get(LATENT),
        is_pause=traits.thoughts == "pause",
        fact_end=None if config.shuffle_facts is None else _single_token(backbone, config.shuffle_facts),
        bos=backbone.tokenizer.bos_token_id,
    )


def _demand_facts(config: RunConfig, tokens: Tokens, train_set: Dataset) -> None:
    questions = train_set.select_columns("question_ids")
    if tokens.fact_end is not None and not any(tokens.fact_end in row["question_ids"] for row in questions):
        raise InputError(
            f"shuffle_facts: no training question has the token {config.shuffle_facts!r}; name the one that ends every "
            "fact as it stands there (with GPT-2's tokenizer the space before it belongs to it: ' |')"
        )


def _single_token(backbone: Backbone, text: str) -> int:
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"shuffle_facts: {text!r} is {len(ids)} tokens; name the one token that ends every fact, such as '|' in "
            "symbolic ProsQA"
        )
    return int(ids[0])


def _checkpoint_activations(model: Coconut, wanted: ActivationCheckpointingConfig) -> None:
    try:
        model.enable_activation_checkpointing(wanted.every_n_layers, wanted.offload)
    except ValueError as error:
        raise InputError(str(error)) from None


def _stage_to_evaluate(config: RunConfig, curriculum: Curriculum) -> int:
    """The stage named by `resume`, else the one stored with the weights, else 0.

    Raises InputError when the run and the weights disagree about the thoughts.
    """
    stored = stored_settings(str(config.load_model_path))
    if stored is None:
        return curriculum.stage(config.resume)
    asked = latent_settings(config)
    differing = [key for key, value in asked.items() if stored[key] != value]
    if differing:
        lines = "\n".join(f"  - {key}: trained with {stored[key]!r}, the run says {asked[key]!r}" for key in differing)
        raise InputError(f"{config.load_model_path} was trained otherwise than it would be evaluated\n{lines}")
    return curriculum.stage(config.resume) if config.resume else stored["stage"]


def _write_description(config: RunConfig, ds_config: dict[str, Any]) -> None:
    folder = config.run_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"save_path: {folder} cannot be made: {error.strerror}; name a folder to write in") from None
    write_record(folder / "run_config.yaml", config.to_yaml())
    write_record(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    write_record(folder / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")


def _opening(config: RunConfig, sizes: BatchSizes, ds_config: dict[str, Any], backbone: Backbone, n_train: int) -> str:
    precision = next((name for name in ("bf16", "fp16") if ds_config[name]["enabled"]), "fp32")
    n_parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
    context = config.latent_context
    window = ""
    if context is not None:
        weights = [round(weight, 4) for weight in context.newest_first]
        window = f", {'learned ' * context.learned}window {weights} ({context.scope})"
    return (
        f"{config.name}: {config.method}{window}, {n_parameters / 1e6:.2f} M parameters, {precision}, "
        f"{config.deepspeed}, {sizes.world} x {distributed.device().type}\n"
        f"{n_train} training examples, {sizes.total} a step ({sizes.micro} x {sizes.accumulation} accumulated x "
        f"{sizes.world} ranks), {config.num_epochs} epochs"
    )


def summary_table(evaluations: list[dict[str, Any]]) -> str:
    """Accuracy per stage: the last and the best evaluation in each."""
    rows = ["stage  epochs   last accuracy   best accuracy   tokens an answer"]
    for stage in sorted({row["stage"] for row in evaluations}):
        mine = [row for row in evaluations if row["stage"] == stage]
        last, best = mine[-1], max(mine, key=lambda row: row["accuracy"])
        rows.append(
            f"{stage:>5}  {mine[0]['epoch']:>2}-{last['epoch']:<3}   {last['accuracy']:>13.1%}   "
            f"{best['accuracy']:>13.1%}   {last['mean_new_tokens']:>16.1f}"
        )
    return "\n".join(rows)


def _evaluation_text(config: RunConfig, path: str, stage: int, evaluation: Evaluation) -> str:
    by_steps = ", ".join(f"{steps} steps {share:.1%}" for steps, share in evaluation.accuracy_by_steps.items())
    return (
        f"{config.load_model_path} on {path}, stage {stage}: accuracy {evaluation.accuracy:.1%} "
        f"({evaluation.n_correct}/{evaluation.n_total}; {by_steps}), chain match {evaluation.cot_match:.1%}, "
        f"loss {evaluation.valid_loss:.4f}, {evaluation.mean_new_tokens:.1f} tokens an answer, "
        f"{evaluation.examples_per_s:.1f} examples/s"
    )
