"""The stage-aware training loop: fit -> _enter_stage -> _train_epoch -> _finish_epoch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from coconut_ds import distributed
from coconut_ds.config import BatchSizes, RunConfig
from coconut_ds.console import progress as progress_bar
from coconut_ds.console import say
from coconut_ds.curriculum.collator import Tokens
from coconut_ds.curriculum.loaders import TrainingWindows, training_loader, windows_per_epoch
from coconut_ds.curriculum.stages import Curriculum
from coconut_ds.engine.stage_boundary import epochs_until_reset, new_schedule, reset_optimizer_state, resets_before
from coconut_ds.memory import peak_memory_gib
from coconut_ds.model.backbone import Backbone
from coconut_ds.tracking import Tracker
from coconut_ds.training.checkpoint import Checkpoints, Progress, latent_settings, read_progress
from coconut_ds.training.evaluator import Evaluation, Evaluator
from coconut_ds.training.step import Pending, accumulate_gradients, fetch

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of; built by `session.py`."""

    config: RunConfig
    sizes: BatchSizes
    curriculum: Curriculum
    tokens: Tokens
    backbone: Backbone
    engine: deepspeed.DeepSpeedEngine
    train_set: Dataset
    evaluator: Evaluator
    tracker: Tracker


class Trainer:
    """Runs the epochs of a run, or what is left of them."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.config = parts.config
        self.engine = parts.engine
        self.curriculum = parts.curriculum
        self.tracker = parts.tracker
        self.checkpoints = Checkpoints(parts.config.run_folder, parts.config.keep_checkpoints)
        self.progress = Progress(epochs=parts.config.resume)
        self.steps_per_epoch = windows_per_epoch(len(parts.train_set), parts.sizes)
        self.most_steps = max(map(len, parts.train_set["steps"]))

    def fit(self) -> None:
        """Train every epoch that is left; continues from the newest checkpoint of the run folder."""
        newest = None if self.config.debug else self.checkpoints.newest()
        if newest is not None:
            self.progress = read_progress(newest)
        first = self.progress.epochs
        self._start_schedule(self._first_epoch_of_schedule(first))
        if newest is not None:
            self.checkpoints.restore(newest, self.engine, self.schedule)
            say(f"continuing from {newest}: {first} of {self.config.num_epochs} epochs are done")
            if self.config.load_model_path:
                say(f"load_model_path {self.config.load_model_path} is not used: the run goes on from its own weights")
        self.tracker.rewind(first)
        for epoch in range(first, self.config.num_epochs):
            self._enter_stage(epoch, is_first=epoch == first)
            self._train_epoch(epoch)
            self._finish_epoch(epoch)

    def _first_epoch_of_schedule(self, epoch: int) -> int:
        """The epoch in which the schedule in force when `epoch` starts (before a reset there) began."""
        start = max(epoch - 1, self.config.resume)
        while start > self.config.resume and not resets_before(start, self.config, self.curriculum):
            start -= 1
        return start

    def _start_schedule(self, epoch: int) -> None:
        n_epochs = epochs_until_reset(epoch, self.config, self.curriculum)
        self.schedule = new_schedule(self.engine, self.config, n_epochs * self.steps_per_epoch)

    def _enter_stage(self, epoch: int, is_first: bool) -> None:
        started = time.monotonic()
        stage = self.curriculum.stage(epoch)
        resets = resets_before(epoch, self.config, self.curriculum) and epoch > self.config.resume
        if resets:
            reset_optimizer_state(self.engine)
            self._start_schedule(epoch)
        parts = self.parts
        self.windows = TrainingWindows(
            parts.train_set,
            self.curriculum,
            parts.tokens,
            parts.sizes,
            distributed.rank(),
            epoch,
            self.config.group_by_length,
        )
        if is_first or resets or stage != self.curriculum.stage(epoch - 1):
            self.tracker.log(
                "stage",
                epoch=epoch + 1,
                stage=stage,
                step=self.progress.step,
                n_thoughts=self.curriculum.layout(stage, self.most_steps).n_thoughts,
                switch_time_s=time.monotonic() - started,
                optimizer_reset=resets,
            )

    def _train_epoch(self, epoch: int) -> None:
        self.engine.train()
        stage = self.curriculum.stage(epoch)
        label = f"epoch {epoch + 1}/{self.config.num_epochs}, stage {stage}"
        started = time.monotonic()
        pending: list[Pending] = []
        for window in progress_bar(training_loader(self.windows), len(self.windows), label):
            learning_rate = self.schedule.get_last_lr()[0]
            pending.append(accumulate_gradients(self.engine, window, self.config.loss_normalization))
            number = self.progress.step + 1
            logs = number % self.config.log_every_steps == 0
            # Before the update, so that weights that went wrong are not saved.
            figures = fetch(pending, number) if logs or number % self.steps_per_epoch == 0 else []
            if figures:
                pending.clear()
            self.engine.step()
            if self.engine.was_step_applied():
                self.schedule.step()
            self.progress = replace(self.progress, step=number)
            finished = time.monotonic()
            if logs:
                self.tracker.log(
                    "train_step",
                    epoch=epoch + 1,
                    stage=stage,
                    step=number,
                    lr=learning_rate,
                    grad_norm=self._gradient_norm(),
                    step_time_s=finished - started,
                    peak_memory_gib=peak_memory_gib(),
                    **asdict(figures[-1]),
                )
            started = finished

    def _gradient_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _finish_epoch(self, epoch: int) -> None:
        stage = self.curriculum.stage(epoch)
        self.progress = replace(self.progress, epochs=epoch + 1)
        outcome = self.parts.evaluator.run(stage)
        evaluation = outcome[0] if outcome else None
        if outcome:
            self._record(epoch, stage, *outcome)
        accuracy = distributed.from_main(evaluation.accuracy if evaluation else None)
        improved = accuracy > self.progress.best_accuracy
        if improved:
            name = self.checkpoints.path_for(epoch + 1).name
            self.progress = replace(self.progress, best_accuracy=accuracy, best_checkpoint=name)
        if not self.config.debug and (improved or not self.config.save_only_improve):
            self._save(epoch, stage)

    def _record(self, epoch: int, stage: int, evaluation: Evaluation, predictions: list[dict[str, Any]]) -> None:
        self.tracker.log("eval", epoch=epoch + 1, stage=stage, step=self.progress.step, **evaluation.as_dict())
        write_predictions(self.config, f"epoch_{epoch + 1:04d}", predictions)
        say(
            f"epoch {epoch + 1}/{self.config.num_epochs}, stage {stage}: validation loss {evaluation.valid_loss:.4f}, "
            f"accuracy {evaluation.accuracy:.1%} ({evaluation.n_correct}/{evaluation.n_total}), "
            f"{evaluation.mean_new_tokens:.1f} tokens an answer"
        )

    def _save(self, epoch: int, stage: int) -> None:
        started = time.monotonic()
        settings = {**latent_settings(self.config), "epochs": epoch + 1, "stage": stage}
        path = self.checkpoints.save(self.engine, self.parts.backbone, settings, self.schedule, self.progress)
        seconds = time.monotonic() - started
        self.tracker.log("checkpoint", epoch=epoch + 1, step=self.progress.step, path=str(path), seconds=seconds)


def write_predictions(config: RunConfig, name: str, predictions: list[dict[str, Any]]) -> None:
    """One prediction a line in `predictions/NAME.jsonl` of the run folder."""
    folder = config.run_folder / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in predictions)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
