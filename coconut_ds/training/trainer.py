"""The stage-aware training loop: fit -> _enter_stage -> _train_epoch -> _step, _finish_epoch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coconut_ds.checkpoints.store import Checkpoints, Progress, Stored, read_stored, restore
from coconut_ds.checkpoints.weights import latent_settings, origin
from coconut_ds.config.resolved_run import ResolvedRun
from coconut_ds.data.batches import Batch
from coconut_ds.data.loaders import TrainingSteps, steps_per_epoch, training_loader
from coconut_ds.engine.internals import loss_scale
from coconut_ds.engine.reset import epochs_until_reset, new_schedule, reset_optimizer_state, resets_before
from coconut_ds.engine.states import updates_done, whole_weights
from coconut_ds.errors import InputError, out_of_memory
from coconut_ds.inference.evaluator import Evaluation, Evaluator
from coconut_ds.memory.meter import begin_peak, peak_memory
from coconut_ds.runs.metrics import skipped_text, skipped_warning, skips_most
from coconut_ds.runs.paths import RunFolder, epoch_name
from coconut_ds.runs.predictions import cut_warning
from coconut_ds.runs.terminal import EpochProgress, Pace, log_line, say, terminal
from coconut_ds.runs.tracker import Tracker, write_predictions
from coconut_ds.runtime import distributed, watchdog
from coconut_ds.runtime.interruption import Interruption
from coconut_ds.training.setup import Setup
from coconut_ds.training.step import NonFiniteLossError, optimizer_step
from coconut_ds.training.summary import lengths_text

if TYPE_CHECKING:
    import deepspeed


@dataclass
class Trainer:
    """Runs the remaining epochs of a run."""

    run: ResolvedRun
    setup: Setup
    engine: deepspeed.DeepSpeedEngine
    evaluator: Evaluator
    tracker: Tracker
    checkpoints: Checkpoints
    newest: Path | None
    """The checkpoint with the weights of the engine, if the run resumes."""

    def __post_init__(self) -> None:
        self.config, self.curriculum = self.run.config, self.setup.curriculum
        self.progress = Progress(epochs=self.config.resume)
        self.steps_per_epoch = steps_per_epoch(len(self.setup.train_set), self.run.sizes)
        self.most_steps = max(map(len, self.setup.train_set["steps"]))
        self.evaluation: Evaluation | None = None
        """Of the weights as they are now; only rank 0 has it."""
        self._has_warned_of_cut = self._has_warned_of_skips = False

    def fit(self) -> bool:
        """Train the rest of the run; False if it stopped on request before the end, and has saved."""
        stored = read_stored(self.newest) if self.newest else None
        if stored:
            self.progress = self._checked(stored)
        first = self._first_epoch_of_schedule()
        self._start_schedule(first, self._scheduled(stored, first))
        if self.newest is not None:
            restore(self.newest, self.engine)
        self.tracker.rewind(stored.metrics_bytes if stored else 0)
        n_epochs = self.config.num_epochs - self.progress.epochs
        self.pace = Pace(n_epochs * self.steps_per_epoch - self.progress.steps_in_epoch, n_epochs)
        try:
            with watchdog.watching(self.config.hang_limit_s, terminal()), Interruption() as self.interruption:
                is_complete = self._run_epochs()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(f"after optimizer step {self.progress.step}", error) from error
        if is_complete:
            self.tracker.log("end", epochs=self.progress.epochs, step=self.progress.step, **self._skips())
        return is_complete

    def _run_epochs(self) -> bool:
        for epoch in range(self.progress.epochs, self.config.num_epochs):
            self._enter_stage(epoch)
            if not self._train_epoch(epoch):
                return False
            saved = self._finish_epoch(epoch)
            if epoch + 1 < self.config.num_epochs and self._stops(epoch, saved):
                return False
        return True

    def _checked(self, stored: Stored) -> Progress:
        """The progress to resume from; raises InputError if its place within an epoch means something else now."""
        total = self.run.sizes.total
        if stored.progress.steps_in_epoch and stored.train_batch_size != total:
            raise InputError(
                f"{self.newest}: made within an epoch, after {stored.progress.steps_in_epoch} steps of "
                f"{stored.train_batch_size} examples; this run takes {total} per step and has no such place; set "
                f"train_batch_size: {stored.train_batch_size} without gradient_accumulation_steps"
            )
        return stored.progress

    def _first_epoch_of_schedule(self) -> int:
        """The epoch in which the current schedule began, before a reset at the start of an epoch."""
        start = max(self.progress.epochs - (self.progress.steps_in_epoch == 0), self.config.resume)
        while start > self.config.resume and not resets_before(start, self.config, self.curriculum):
            start -= 1
        return start

    def _scheduled(self, stored: Stored | None, first: int) -> int:
        """Steps taken of the schedule that began in epoch `first`."""
        if stored is None or stored.train_batch_size == self.run.sizes.total:
            return stored.scheduled if stored else 0
        say(
            f"{self.run.sizes.total} examples per step from here on, {stored.train_batch_size} before: losses will not "
            "match those of an uninterrupted run"
        )
        return (self.progress.epochs - first) * self.steps_per_epoch

    def _start_schedule(self, epoch: int, done: int = 0) -> None:
        n_epochs = epochs_until_reset(epoch, self.config, self.curriculum)
        self.schedule = new_schedule(self.engine, self.config, n_epochs * self.steps_per_epoch, done)

    def _enter_stage(self, epoch: int) -> None:
        started = time.monotonic()
        stage = self.curriculum.stage(epoch)
        is_first, is_begun = epoch == self.config.resume, self.progress.steps_in_epoch > 0
        resets = resets_before(epoch, self.config, self.curriculum) and not is_first and not is_begun
        if resets:
            reset_optimizer_state(self.engine)
            self._start_schedule(epoch)
        self.steps = TrainingSteps(
            self.setup.train_set,
            self.curriculum,
            self.setup.tokens,
            self.run.sizes,
            distributed.rank(),
            epoch,
            self.config.group_by_length,
            in_step=self.engine.zero_optimization_stage() == 3,
        )
        if not is_begun and (is_first or resets or stage != self.curriculum.stage(epoch - 1)):
            self.tracker.log(
                "stage",
                epoch=epoch + 1,
                stage=stage,
                step=self.progress.step,
                n_thoughts=self.curriculum.layout(stage, self.most_steps).n_thoughts,
                switch_time_s=time.monotonic() - started,
                optimizer_reset=resets,
            )

    def _train_epoch(self, epoch: int) -> bool:
        """The rest of an epoch's steps; False if it stopped on request."""
        self.engine.train()
        self.evaluation = None
        first, every = self.progress.steps_in_epoch, self.config.save_every_steps
        begin_peak()  # an evaluation is no step
        with EpochProgress(self._place(epoch), len(self.steps) - first, self.pace) as bar:
            for batches in training_loader(self.steps, first, self.config.num_workers):
                loss = self._step(epoch, batches)
                bar.step(loss, skipped_text(self.progress.skipped, self.progress.step))
                saves = every is not None and self.progress.step % every == 0
                if saves:
                    self._save(epoch)
                if self._stops(epoch, saves):
                    return False
        return True

    def _place(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self.config.num_epochs}, stage {self.curriculum.stage(epoch)}"

    def _step(self, epoch: int, batches: list[Batch]) -> float:
        """One optimizer step; its loss."""
        watchdog.alive()
        started = time.monotonic()
        learning_rate = self.schedule.get_last_lr()[0]
        number = self.progress.step + 1
        metrics = optimizer_step(self.engine, batches, self.config.loss_normalization, self.config.loss_weights)
        skipped = not self.engine.was_step_applied()
        if not skipped:
            self.schedule.step()
        elif not loss_scale(self.engine):
            raise NonFiniteLossError(
                f"gradients are not finite at optimizer step {number}, nothing was updated (loss {metrics.loss:.4g}); "
                "lower lr, or set max_grad_norm"
            )
        n_skipped = self.progress.skipped + skipped
        in_epoch = self.progress.steps_in_epoch + 1
        self.progress = replace(self.progress, step=number, steps_in_epoch=in_epoch, skipped=n_skipped)
        if skipped:
            log_line(
                f"fp16: optimizer step {number} was skipped, its gradients overflowed and no weight was updated; the "
                f"loss scale is {loss_scale(self.engine)['cur_scale']:g} now"
            )
        seconds = time.monotonic() - started
        self.pace.stepped(self.run.sizes.total, seconds)
        if number % self.config.log_every_steps == 0:
            # Gradients that overflowed have no norm.
            norm = None if skipped else self.engine.get_global_grad_norm()
            self.tracker.log(
                "train_step",
                epoch=epoch + 1,
                stage=self.curriculum.stage(epoch),
                step=number,
                lr=learning_rate,
                grad_norm=None if norm is None else float(norm),
                step_time_s=seconds,
                **peak_memory(),
                **metrics.as_dict(),
                **self._skips(skipped),
            )
            begin_peak()
        return metrics.loss

    def _skips(self, skipped: bool | None = None) -> dict[str, int]:
        """For an event: whether fp16 `skipped` its step, and how many steps of the run; empty in other precisions."""
        if not loss_scale(self.engine):
            return {}
        of_step = {} if skipped is None else {"skipped": skipped}
        return {**of_step, "n_skipped_in_run": self.progress.skipped}

    def _stops(self, epoch: int, saved: bool) -> bool:
        """Whether any rank was requested to stop; then the run is saved, unless it has just been saved."""
        stops = self.interruption.agreed()
        if stops and not saved:
            self._save(epoch)
        return stops

    def _finish_epoch(self, epoch: int) -> bool:
        """Evaluate, and save if the run asks for it; whether it did."""
        started = time.monotonic()
        window = self.setup.model.latent_window
        with whole_weights(self.engine):
            outcome = self.evaluator.run(self.curriculum.stage(epoch))
            learned = {} if window.logits is None else {"latent_weights": window.current()}
        self.pace.evaluated(time.monotonic() - started)
        self.progress = replace(self.progress, epochs=epoch + 1, steps_in_epoch=0)
        if outcome:
            self.evaluation, predictions = outcome
            self._record(epoch, self.evaluation, predictions, learned)
        accuracy = distributed.from_main(self.evaluation.accuracy if self.evaluation else None)
        improved = accuracy > self.progress.best_accuracy
        if improved:
            name = self.checkpoints.path_for(self.progress).name
            self.progress = replace(self.progress, best_accuracy=accuracy, best_checkpoint=name)
        saves = improved or not self.config.save_only_improve
        if saves:
            self._save(epoch)
        return saves

    def _record(
        self, epoch: int, evaluation: Evaluation, predictions: list[dict[str, Any]], learned: dict[str, Any]
    ) -> None:
        """Log, write and print an evaluation. A warning comes once: the lines of later epochs have the counts."""
        stage = self.curriculum.stage(epoch)
        values = evaluation.as_dict() | learned
        self.tracker.log("eval", epoch=epoch + 1, stage=stage, step=self.progress.step, **values)
        self.tracker.log_predictions(epoch + 1, stage, predictions)
        write_predictions(RunFolder(self.config.run_folder), epoch_name(epoch + 1), predictions)
        limit, n_cut = self.config.max_new_tokens, evaluation.n_cut
        lengths = lengths_text(evaluation.mean_new_tokens, evaluation.mean_thoughts, n_cut, limit)
        best = ", best so far" if evaluation.accuracy > max(0, self.progress.best_accuracy) else ""
        say(
            f"{self._place(epoch)}: accuracy {evaluation.accuracy:.1%} ({evaluation.n_correct}/{evaluation.n_total}), "
            f"loss {evaluation.valid_loss:.4f}, {lengths}{best}"
        )
        if n_cut and not self._has_warned_of_cut:
            self._has_warned_of_cut = True
            say(f"warning: {cut_warning(n_cut, evaluation.n_total, limit)}")
        n_skipped, n_steps = self.progress.skipped, self.progress.step
        if skips_most(n_skipped, n_steps) and not self._has_warned_of_skips:
            self._has_warned_of_skips = True
            say(f"warning: {skipped_warning(n_skipped, n_steps)}")

    def _save(self, epoch: int) -> None:
        """Save the state of the run, with weights that have seen (a part of) `epoch`; not in debug mode."""
        if self.config.debug:
            return
        watchdog.alive()
        started = time.monotonic()
        settings = {
            **latent_settings(self.config),
            **origin(self.config),
            "epochs": self.progress.epochs,
            "stage": self.curriculum.stage(epoch),
            "results": self.evaluation.as_dict() if self.evaluation else None,
        }
        stored = Stored(
            self.progress,
            self.run.sizes.total,
            self.tracker.position(),
            updates_done(self.engine),
            self.schedule.last_epoch,
            loss_scale(self.engine),
        )
        path = self.checkpoints.save(self.engine, self.setup.backbone, settings, stored)
        seconds = time.monotonic() - started
        self.tracker.log("checkpoint", epoch=epoch + 1, step=self.progress.step, path=str(path), seconds=seconds)
