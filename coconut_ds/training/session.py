"""Builds the parts of a run from its configuration and lets them work: training, or evaluation alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from coconut_ds import strict_json
from coconut_ds.checkpoints.store import Checkpoints, read_stored
from coconut_ds.checkpoints.weights import latent_settings, load_initial
from coconut_ds.config.deepspeed_config import Precision
from coconut_ds.config.run_config import BatchSizes, RunConfig, batch_sizes, load_run_config
from coconut_ds.data.batches import Tokens
from coconut_ds.data.doubts import doubts, shared_questions
from coconut_ds.data.records import longest_prompt, read_records
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine.build import build_engine, process_group
from coconut_ds.errors import InputError
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.memory.batch_size import choose_eval_batch, choose_micro_batch, deciding_sequences, planned_peak
from coconut_ds.model.backbone import Backbone
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.folder import stored_settings
from coconut_ds.runs import changes as run_changes
from coconut_ds.runs.answer_lengths import cut_warning
from coconut_ds.runs.changes import DATA_KEYS, DataFile
from coconut_ds.runs.dashboards import demand_libraries_of
from coconut_ds.runs.environment import describe_environment
from coconut_ds.runs.events import read_metrics
from coconut_ds.runs.terminal import say, terminal
from coconut_ds.runs.tracker import Tracker, write_record
from coconut_ds.runtime import distributed, watchdog
from coconut_ds.training.setup import (
    DEBUG_EXAMPLES,
    Materials,
    build_coconut,
    load_materials,
    records_if_any,
    tokenized,
)
from coconut_ds.training.summary import changed_text, closing, evaluation_text, finished, opening, skip_lines
from coconut_ds.training.trainer import Parts, Trainer, write_predictions

_MOST_TO_COMPARE = 32 * 2**20
"""Bytes of a training file that is read for an evaluation alone."""


def train(config: RunConfig, resolve: Callable[[RunConfig, BatchSizes], dict[str, Any]]) -> None:
    """Train a run to its end and print accuracy by stage; `resolve` makes the DeepSpeed configuration."""
    checkpoints = Checkpoints(config.run_folder, config.keep_checkpoints)
    if config.debug and checkpoints.found():
        raise InputError(f"debug: {config.run_folder} holds a run, whose records would be lost; set another name")
    demand_libraries_of(config)
    torch.manual_seed(config.seed)
    with process_group(config.hang_limit_s):
        _train(config, resolve, checkpoints)


def _train(
    config: RunConfig, resolve: Callable[[RunConfig, BatchSizes], dict[str, Any]], checkpoints: Checkpoints
) -> None:
    newest = checkpoints.newest_intact()
    is_finished = distributed.from_main(distributed.is_main() and _is_finished(config, newest))
    materials = load_materials(_going_on_from(newest, config, is_finished))
    if is_finished:
        if distributed.is_main() and newest is not None:
            _say_finished(config, newest, materials)
        return
    curriculum, backbone, model, tokens = materials.curriculum, materials.backbone, materials.model, materials.tokens
    world = distributed.world_size()
    if config.batch_size_training == "auto":
        provisional = resolve(config, batch_sizes(config, world))
        micro = choose_micro_batch(config, provisional, model, materials.train_set, curriculum, tokens)
        config = config.model_copy(update={"batch_size_training": micro})
    sizes = batch_sizes(config, world)
    ds_config = resolve(config, sizes)
    planned = None
    if distributed.is_main():
        _describe(config, ds_config, materials, newest)
        # Before the engine takes the weights apart; the other ranks wait in it.
        planned = _planned(config, ds_config, materials, sizes.micro)
    # Ranks draw their own dropout from here on; weights and order were drawn from the seed they share.
    torch.manual_seed(config.seed + 1_000_003 * distributed.rank())
    engine = build_engine(model, config, ds_config)
    evaluator = _evaluator(config, model, materials.valid_set, curriculum, tokens, backbone)
    if distributed.is_main():
        say(opening(config, sizes, ds_config, materials, planned))
        _warn(materials.doubts)
    train_set = materials.train_set
    tracker = Tracker(config, distributed.is_main())
    parts = Parts(
        config, sizes, curriculum, tokens, backbone, engine, train_set, evaluator, tracker, checkpoints, newest
    )
    try:
        trainer = Trainer(parts)
        is_complete = trainer.fit()
    finally:
        tracker.close()
    progress = trainer.progress
    if not is_complete:
        place = "the start (debug saves nothing)" if config.debug else checkpoints.found()[-1]
        say(f"stopped as asked; the same command goes on from {place}")
        if lines := skip_lines(progress.skipped, progress.step):
            say("\n".join(lines))
        return
    if distributed.is_main():
        say(closing(config, read_metrics(tracker.path).evaluations, progress.skipped, progress.step))


def _planned(config: RunConfig, ds_config: dict[str, Any], materials: Materials, micro: int) -> tuple[int, int] | None:
    """What `planned_peak` says, for a line to read: a run does not fail for want of it."""
    try:
        sequences = deciding_sequences(config, materials.train_set, materials.curriculum, materials.tokens)
        return planned_peak(materials.model, ds_config, sequences, micro)
    except Exception:
        traceback.print_exc()
        return None


def _going_on_from(newest: Path | None, config: RunConfig, is_finished: bool) -> RunConfig:
    """The configuration to load the model with: an interrupted run has its own weights."""
    if newest is None:
        return config
    if not is_finished:
        say(f"going on from {newest}")
        if config.load_model_path:
            say(f"load_model_path {config.load_model_path} is not used: the run goes on from its own weights")
    return config.model_copy(update={"load_model_path": str(newest)})


def evaluate(config: RunConfig, precision: Precision) -> None:
    """Evaluate `load_model_path` on the test set, or on the validation set where no test set is named."""
    with process_group(config.hang_limit_s):
        _evaluate(config, precision)


def _evaluate(config: RunConfig, precision: Precision) -> None:
    path = str(config.test_path or config.val_path)
    records = read_records(path, DEBUG_EXAMPLES if config.debug else None)
    backbone = load_initial(config)
    curriculum = Curriculum.of(config)
    stage = _stage_to_evaluate(config, curriculum)
    examples = tokenized(path, records, backbone, curriculum, config.max_new_tokens)
    model, tokens = build_coconut(config, backbone)
    if distributed.is_main():
        _warn(_doubts(config, path, records, examples, backbone))
    model.to(distributed.device(), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    evaluator = _evaluator(config, model, examples, curriculum, tokens, backbone)
    with watchdog.watching(config.hang_limit_s, terminal()):
        outcome = evaluator.run(stage)
    if outcome is None:
        return
    evaluation, predictions = outcome
    name = f"eval_{Path(path).stem}"
    write_predictions(config, name, predictions)
    say(evaluation_text(config, path, stage, evaluation))
    if evaluation.n_cut:
        say(f"warning: {cut_warning(evaluation.n_cut, evaluation.n_total, config.max_new_tokens)}")
    say(f"predictions: {config.run_folder / 'predictions' / name}.jsonl")
    say(strict_json.dumps({"path": str(path), "stage": stage, **evaluation.as_dict()}))


def _doubts(
    config: RunConfig, path: str, records: list[dict[str, Any]], examples: Dataset, backbone: Backbone
) -> list[str]:
    """What is doubtful in the set to evaluate, also beside the training set where that is here and small."""
    found = doubts(path, records, examples, backbone.tokenizer, is_evaluated=True)
    train_path = str(config.train_path)
    # A larger one takes seconds to read; its run has compared its own sets.
    if train_path != path and Path(train_path).is_file() and Path(train_path).stat().st_size <= _MOST_TO_COMPARE:
        found += shared_questions(path, records, train_path, records_if_any(train_path))
    return found


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        say(f"warning: {line}")


def _evaluator(
    config: RunConfig, model: Coconut, examples: Dataset, curriculum: Curriculum, tokens: Tokens, backbone: Backbone
) -> Evaluator:
    rows = config.eval_batch_size
    if rows == "auto":
        rows = choose_eval_batch(model, longest_prompt(examples, curriculum), config.max_new_tokens, len(examples))
        say(f"eval_batch_size: auto is {rows}")
    return Evaluator(model, examples, curriculum, tokens, backbone.tokenizer, rows, config.max_new_tokens)


def _stage_to_evaluate(config: RunConfig, curriculum: Curriculum) -> int:
    """The stage named by `resume`, else the one stored with the weights, else 0.

    Raises InputError when the run and the weights disagree about the thoughts.
    """
    stored = stored_settings(str(config.load_model_path))
    if stored is None:
        return curriculum.stage(config.resume)
    asked = latent_settings(config)
    # A folder that was not written by a run knows less.
    differing = [key for key, value in asked.items() if key in stored and stored[key] != value]
    if differing:
        lines = "\n".join(f"  - {key}: trained with {stored[key]!r}, the run says {asked[key]!r}" for key in differing)
        raise InputError(
            f"{config.load_model_path} was trained otherwise than it would be evaluated; ./launch.sh eval CHECKPOINT "
            f"takes the run file it was trained by, or change these:\n{lines}"
        )
    return stored["stage"] if "stage" in stored and not config.resume else curriculum.stage(config.resume)


def _is_finished(config: RunConfig, newest: Path | None) -> bool:
    """Whether nothing is left of the run to train.

    A run whose last checkpoint is lost is not finished: it resumes from the checkpoint before it.
    """
    if newest is None:
        return False
    progress = read_stored(newest).progress
    if progress.epochs > config.num_epochs:
        return True  # asked for less than there is, whether that was its end or not
    if not run_changes.is_finished(config):
        return False
    # With save_only_improve the last checkpoint may be older than the end.
    saved_last = [Path(each.path).name for each in read_metrics(config.run_folder / "metrics.jsonl").checkpoints[-1:]]
    return progress.epochs >= config.num_epochs or saved_last == [newest.name]


def _say_finished(config: RunConfig, newest: Path, materials: Materials) -> None:
    """Say that nothing was trained, what differs from what was, and the results; nothing is written."""
    metrics = read_metrics(config.run_folder / "metrics.jsonl")
    progress = read_stored(newest).progress
    changed = run_changes.changes(config, _data_files(config, materials), distributed.world_size())
    # With save_only_improve the last checkpoint may be older than the end.
    say(finished(config, max([progress.epochs, *(end.epochs for end in metrics.ends)]), changed))
    say(closing(_as_trained(config), metrics.evaluations, progress.skipped, progress.step))


def _data_files(config: RunConfig, materials: Materials) -> dict[str, DataFile]:
    n_examples = (len(materials.train_set), len(materials.valid_set))
    return run_changes.data_files(config, dict(zip(DATA_KEYS, n_examples)))


def _as_trained(config: RunConfig) -> RunConfig:
    """The configuration in the run folder, wherever the folder lies now; `config` if that cannot be read."""
    try:
        stored = load_run_config(config.run_folder / "run_config.yaml")
    except InputError:
        return config
    return stored.model_copy(update={"save_path": config.save_path, "name": config.name})


def _describe(config: RunConfig, ds_config: dict[str, Any], materials: Materials, newest: Path | None) -> None:
    """Write what this start trains with, and say in what it differs from the start it goes on from.

    Where nothing is left to train, the files keep what the run was trained with.
    """
    data, ranks = _data_files(config, materials), distributed.world_size()
    environment = {
        **describe_environment(),
        "ranks": ranks,
        "data": {key: file.model_dump() for key, file in data.items()},
    }
    if newest is not None:
        progress, changed = read_stored(newest).progress, run_changes.changes(config, data, ranks, ds_config)
        if progress.epochs >= config.num_epochs:
            say(finished(config, progress.epochs, changed))
            return
        if changed:
            say(changed_text(changed))
        earlier = run_changes.earlier_changes(config.run_folder)
        environment["changes"] = [*earlier, *({"after_step": progress.step, "change": line} for line in changed)]
    folder = config.run_folder
    write_record(folder / "run_config.yaml", config.to_yaml())
    write_record(folder / "ds_config.json", strict_json.dumps(ds_config, indent=2) + "\n")
    write_record(folder / "environment.json", strict_json.dumps(environment, indent=2) + "\n")
