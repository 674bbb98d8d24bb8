"""Builds the parts of a run from its configuration and lets them work: training, or evaluation alone."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset

from coconut_ds import strict_json
from coconut_ds.checkpoints.store import Checkpoints, demand_weights, read_stored
from coconut_ds.checkpoints.weights import latent_settings, load_initial
from coconut_ds.config.data_paths import short_name
from coconut_ds.config.resolved_run import DraftRun, ResolvedRun, with_micro_batch
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import load_run_config
from coconut_ds.data.batches import Tokens
from coconut_ds.data.doubts import doubts, shared_questions
from coconut_ds.data.files import DataSet, Source, Split, read_set
from coconut_ds.data.records import longest_prompt
from coconut_ds.data.stages import Curriculum
from coconut_ds.engine.build import build_engine, describe_device, process_group
from coconut_ds.errors import InputError, out_of_memory
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.memory.batch_size import (
    card_budget,
    choose_eval_batch,
    choose_micro_batch,
    deciding_sequences,
    planned_peak,
)
from coconut_ds.memory.faster_file import faster_file
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import Elements
from coconut_ds.model.backbone import Backbone, cast_parameters
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.folder import stored_settings
from coconut_ds.runs import changes as run_changes
from coconut_ds.runs.changes import DATA_KEYS, DataFile
from coconut_ds.runs.dashboards import demand_libraries_of
from coconut_ds.runs.environment import describe_environment
from coconut_ds.runs.metrics import Metrics, read_metrics
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.predictions import cut_warning
from coconut_ds.runs.terminal import say, terminal
from coconut_ds.runs.tracker import Tracker, write_predictions, write_record
from coconut_ds.runtime import distributed, watchdog
from coconut_ds.runtime.torch_settings import deterministic
from coconut_ds.training import summary
from coconut_ds.training.setup import DEBUG_EXAMPLES, Setup, build_coconut, load_setup, set_if_any, tokenized
from coconut_ds.training.trainer import Trainer

_MOST_TO_COMPARE = 32 * 2**20
"""Bytes of a training file that is read for an evaluation alone."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(draft: DraftRun) -> None:
    """Train a run to its end, from its newest checkpoint if there is one, and print accuracy by stage."""
    config, folder = draft.config, RunFolder(draft.config.run_folder)
    checkpoints = Checkpoints(folder.path, config.keep_checkpoints)
    if config.debug and checkpoints.found():
        raise InputError(f"debug: {folder} holds a run, whose records would be lost; set another name")
    demand_libraries_of(config)
    torch.manual_seed(config.seed)
    with process_group(config.hang_limit_s), deterministic(config.deterministic):
        newest = checkpoints.newest_intact()
        is_main = distributed.is_main()
        metrics = read_metrics(folder.metrics) if is_main and folder.metrics.is_file() else Metrics()
        is_done = distributed.from_main(newest is not None and _is_done(config, newest, metrics))
        if newest is not None and not is_done:
            say(f"resuming from {newest}")
            if config.load_model_path:
                say(f"load_model_path {config.load_model_path} is not used: the run resumes from its own weights")
        setup = load_setup(config, config.load_model_path if newest is None else str(newest), draft.checkpointing)
        if newest is not None and not is_done:
            demand_weights(newest, setup.model)
        if newest is None or not is_done:
            _train(_measured(draft, setup), folder, setup, checkpoints, newest)
        elif is_main:
            _report_done(config, folder, setup, newest, metrics)


def _train(run: ResolvedRun, folder: RunFolder, setup: Setup, checkpoints: Checkpoints, newest: Path | None) -> None:
    config, model, planned, faster = run.config, setup.model, None, None
    if distributed.is_main():
        _record_start(run, folder, setup, newest)
        # Before the engine partitions the weights; the other ranks wait in it.
        planned = _planned(run, setup)
        faster = planned and _faster(run, setup, planned[1])
    # Ranks draw their own dropout from here on; weights and order were drawn from the seed they share.
    torch.manual_seed(config.seed + 1_000_003 * distributed.rank())
    try:
        engine = build_engine(model, config, run.ds_config)
    except torch.OutOfMemoryError as error:
        raise out_of_memory("before the first optimizer step", error) from error
    evaluator = _evaluator(run, model, setup.valid_set, setup.curriculum, setup.tokens, setup.backbone)
    if distributed.is_main():
        say(summary.opening(run, setup, planned, faster))
        _warn(setup.doubts)
    tracker = Tracker(config, distributed.is_main())
    try:
        trainer = Trainer(run, setup, engine, evaluator, tracker, checkpoints, newest)
        is_complete = trainer.fit()
    finally:
        tracker.close()
    progress = trainer.progress
    if is_complete and distributed.is_main():
        say(summary.closing(config, folder, read_metrics(folder.metrics).evaluations, progress.skipped, progress.step))
    elif not is_complete:
        place = "the start (debug saves nothing)" if config.debug else checkpoints.found()[-1]
        stopped = f"stopped as requested; the same command resumes from {place}"
        say("\n".join([stopped, *summary.skip_lines(progress.skipped, progress.step)]))


def _measured(draft: DraftRun, setup: Setup) -> ResolvedRun:
    """The run with the micro-batch that `auto` stands for, now that there is a model to measure."""
    micro = draft.sizes.micro
    if not draft.is_measured:
        micro = choose_micro_batch(draft, setup.model, setup.train_set, setup.curriculum, setup.tokens)
    return with_micro_batch(draft, micro)


def _planned(run: ResolvedRun, setup: Setup) -> tuple[int, int] | None:
    """What `planned_peak` says, for the block at the start; a run does not fail for lack of it."""
    try:
        sequences = deciding_sequences(run.config, setup.train_set, setup.curriculum, setup.tokens)
        return planned_peak(setup.model, run.ds_config, sequences, run.sizes.micro)
    except Exception:
        traceback.print_exc()
        return None


def _faster(run: ResolvedRun, setup: Setup, activations: int) -> str | None:
    """On a GPU, the advice of `faster_file` beside a micro-batch of `activations` bytes; None on a CPU."""
    device = distributed.device()
    if device.type != "cuda":
        return None
    budget = card_budget(torch.cuda.mem_get_info(device)[1] / GIB) - activations
    return faster_file(run.config, run.ds_config, run.sizes, describe_device(), Elements.of(setup.model), budget)


def evaluate(draft: DraftRun) -> None:
    """Evaluate `load_model_path` on the test set, or on the validation set if no test set is named."""
    config, folder = draft.config, RunFolder(draft.config.run_folder)
    with process_group(config.hang_limit_s), deterministic(config.deterministic):
        data = read_set(Source.of(config, _evaluated(config)), DEBUG_EXAMPLES if config.debug else None)
        backbone = load_initial(config.model_id, config.load_model_path, config.traits.thoughts != "none")
        curriculum = Curriculum.of(config)
        stage = _stage_to_evaluate(config, curriculum)
        examples = tokenized(data, backbone, curriculum, config.max_new_tokens, config.prompt_format, stage)
        model, tokens = build_coconut(config, backbone, config.load_model_path)
        if distributed.is_main():
            _warn(_doubts(config, data, examples, backbone))
        cast_parameters(model.to(distributed.device()), _DTYPES[draft.precision])
        evaluator = _evaluator(draft, model, examples, curriculum, tokens, backbone)
        with watchdog.watching(config.hang_limit_s, terminal()):
            outcome = evaluator.run(stage)
        if outcome is None:
            return
        evaluation, predictions = outcome
        path = str(config.test_path or config.val_path)
        name = f"eval_{short_name(path)}"
        if data.name != path:  # a part of it
            name += f"_{len(data.records)}_records"
        if config.eval_thoughts is not None:
            name += f"_with_{config.eval_thoughts}_thoughts"
        write_predictions(folder, name, predictions)
        say(summary.evaluation_text(config, data.name, stage, evaluation))
        if evaluation.n_cut:
            say(f"warning: {cut_warning(evaluation.n_cut, evaluation.n_total, config.max_new_tokens)}")
        say(f"predictions: {folder.predictions_file(name)}")
        say(strict_json.dumps({"path": path, "stage": stage, **evaluation.as_dict()}))


def _evaluated(config: RunConfig) -> Split:
    return "test" if config.test_path else "val"


def _doubts(config: RunConfig, data: DataSet, examples: Dataset, backbone: Backbone) -> list[str]:
    """Warnings about the set to evaluate, also against the training set if that is here and small."""
    found = doubts(data, examples, backbone.tokenizer, is_evaluated=True)
    train_path = str(config.train_path)
    is_another = train_path != getattr(config, f"{_evaluated(config)}_path")
    # A larger one takes seconds to read; its run has compared its own sets.
    if is_another and Path(train_path).is_file() and Path(train_path).stat().st_size <= _MOST_TO_COMPARE:
        found += shared_questions(data, set_if_any(config, "train"))
    return found


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        say(f"warning: {line}")


def _evaluator(
    run: DraftRun | ResolvedRun,
    model: Coconut,
    examples: Dataset,
    curriculum: Curriculum,
    tokens: Tokens,
    backbone: Backbone,
) -> Evaluator:
    """The evaluator of a set; its batch is measured here, when everything else has its place on the device."""
    rows, new_tokens = run.eval_rows, run.config.max_new_tokens
    if rows is None:
        rows = choose_eval_batch(model, longest_prompt(examples, curriculum), new_tokens, len(examples))
        say(f"eval_batch_size: auto is {rows}")
    workers, match = run.config.num_workers, run.config.answer_match
    return Evaluator(model, examples, curriculum, tokens, backbone.tokenizer, rows, new_tokens, workers, match)


def _stage_to_evaluate(config: RunConfig, curriculum: Curriculum) -> int:
    """The stage named by `resume`, else the one stored with the weights, else 0.

    Raises InputError if the run and the weights disagree about the thoughts.
    """
    stored = stored_settings(str(config.load_model_path))
    if stored is None:
        if config.latent_projection:
            raise InputError(
                f"latent_projection: {config.latent_projection}, but {config.load_model_path} has no projection of "
                "thoughts to evaluate; set latent_projection to null"
            )
        return curriculum.stage(config.resume)
    # A folder that was not written by a run knows less.
    differing = [
        f"{key}: trained with {stored[key]!r}, the run says {value!r}"
        for key, value in latent_settings(config).items()
        if key in stored and stored[key] != value
    ]
    if differing:
        command = " ".join(summary.evaluate_command())
        raise InputError(
            f"{config.load_model_path} was trained with different settings than this evaluation uses; {command} "
            f"CHECKPOINT takes the run file of the training, or change these:\n{summary.bullets(differing)}"
        )
    return stored["stage"] if "stage" in stored and not config.resume else curriculum.stage(config.resume)


def _is_done(config: RunConfig, newest: Path, metrics: Metrics) -> bool:
    """Whether nothing is left of the run to train.

    A finished run that has lost its last checkpoint is not done: it resumes from the checkpoint before it.
    """
    progress = read_stored(newest).progress
    if progress.epochs > config.num_epochs:
        return True  # fewer were asked for, whether the run had ended there or not
    if not metrics.is_finished(config.num_epochs):
        return False
    # With save_only_improve the last checkpoint may be older than the end.
    saved_last = [Path(each.path).name for each in metrics.checkpoints[-1:]]
    return progress.epochs >= config.num_epochs or saved_last == [newest.name]


def _report_done(config: RunConfig, folder: RunFolder, setup: Setup, newest: Path, metrics: Metrics) -> None:
    """Say that nothing was trained, what differs from the earlier training, and its results; write nothing."""
    progress = read_stored(newest).progress
    changed = run_changes.changes(config, _data_files(config, setup), distributed.world_size())
    # With save_only_improve the last checkpoint may be older than the end.
    say(summary.finished(folder, max([progress.epochs, *(end.epochs for end in metrics.ends)]), changed))
    say(summary.closing(_as_trained(config, folder), folder, metrics.evaluations, progress.skipped, progress.step))


def _data_files(config: RunConfig, setup: Setup) -> dict[str, DataFile]:
    sets = ((len(setup.train_set), setup.hashes[0]), (len(setup.valid_set), setup.hashes[1]))
    return run_changes.data_files(config, dict(zip(DATA_KEYS, sets)))


def _as_trained(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration in the run folder; `config` if that cannot be read."""
    try:
        return load_run_config(folder.run_config)
    except InputError:
        return config


def _record_start(run: ResolvedRun, folder: RunFolder, setup: Setup, newest: Path | None) -> None:
    """Write the settings of this start, and say in what they differ from those of the start it resumes.

    If nothing is left to train, the files keep the settings of the training.
    """
    config, data = run.config, _data_files(run.config, setup)
    environment = {
        **describe_environment(),
        "ranks": run.sizes.world,
        "data": {key: file.model_dump() for key, file in data.items()},
    }
    if newest is not None:
        progress = read_stored(newest).progress
        changed = run_changes.changes(config, data, run.sizes.world, run.ds_config)
        if progress.epochs >= config.num_epochs:
            say(summary.finished(folder, progress.epochs, changed))
            return
        if changed:
            say(summary.changed_text(changed))
        earlier = run_changes.earlier_changes(folder.path)
        environment["changes"] = [*earlier, *({"after_step": progress.step, "change": line} for line in changed)]
    write_record(folder.run_config, config.to_yaml())
    write_record(folder.ds_config, strict_json.dumps(run.ds_config, indent=2) + "\n")
    write_record(folder.environment, strict_json.dumps(environment, indent=2) + "\n")
