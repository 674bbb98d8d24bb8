"""Saves and restores a run: atomic checkpoint folders that any ZeRO file, precision and number of ranks can resume.

    checkpoints/epoch_0003/                     at the end of an epoch
    checkpoints/epoch_0003_step_00000420/       within the fourth epoch, after optimizer step 420
        model/                     fp32 weights, config, tokenizer, coconut.json: plain transformers loads it;
                                   latent_window.safetensors where the window is learned or projects
        step_decoder.safetensors   where steps are written by a decoder with weights of its own
        exp_avg.safetensors        Adam's moments by parameter name, fp32
        exp_avg_sq.safetensors
        random_states.safetensors  of every rank
        progress.json              position in the run, loss scale
        manifest.json              size and SHA-256 of every file

Rank 0 writes all of it; nothing in it is pickled.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coconut_ds import strict_json
from coconut_ds.engine import internals, states
from coconut_ds.errors import InputError
from coconut_ds.memory.meter import GIB
from coconut_ds.model.backbone import Backbone, trained_parameters
from coconut_ds.model.folder import MODEL_FOLDER, stored_weights, stored_window, write_folder
from coconut_ds.model.step_decoder import PREFIX as DECODER_PREFIX
from coconut_ds.model.step_decoder import stored_decoder, write_decoder
from coconut_ds.runs import atomic_folder
from coconut_ds.runs.paths import RunFolder, is_within_epoch
from coconut_ds.runs.terminal import say
from coconut_ds.runtime import distributed, watchdog

_PROGRESS, _RANDOM = "progress.json", "random_states.safetensors"
_PREFIX = "base_causallm."
_SMALL_FILES = 64 * 2**20
"""Bytes reserved for tokenizer, configuration and the like."""
_KEPT_WITHIN_EPOCHS = 2


class CheckpointError(InputError):
    """A checkpoint that cannot be written or resumed from."""


@dataclass(frozen=True)
class Progress:
    """Position of a run."""

    epochs: int = 0
    steps_in_epoch: int = 0
    """Optimizer steps done in the current epoch; `windows` in `progress.json`."""
    step: int = 0
    best_accuracy: float = -1.0
    best_checkpoint: str | None = None
    skipped: int = 0
    """Those of the `step` optimizer steps that fp16 skipped; earlier versions did not write it."""


@dataclass(frozen=True)
class Stored:
    """Contents of `progress.json`."""

    progress: Progress
    train_batch_size: int
    metrics_bytes: int
    """Length of `metrics.jsonl` when the checkpoint was made."""
    updates: int
    """Optimizer updates since the last reset."""
    scheduled: int
    """Steps taken by the current learning-rate schedule."""
    loss_scale: dict[str, float]


def read_stored(path: Path) -> Stored:
    values = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
    progress = _renamed(values["progress"], "windows", "steps_in_epoch")
    return Stored(**values | {"progress": Progress(**progress)})


def _renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in values.items()}


class Checkpoints:
    """The checkpoints of one run folder. `keep` newest ones are kept; None keeps all made at the end of an epoch."""

    def __init__(self, run_folder: Path, keep: int | None):
        self._run_folder = RunFolder(run_folder)
        self.folder = self._run_folder.checkpoints
        self._keep = keep

    def found(self) -> list[Path]:
        """Published checkpoints, oldest first, not verified."""
        return self._run_folder.found_checkpoints()

    def newest_intact(self) -> Path | None:
        """The newest undamaged checkpoint, the same on every rank; None if there are no checkpoints.

        Newer damaged ones are reported and renamed, so that they do not count towards `keep`. Raises CheckpointError if
        all checkpoints are damaged.
        """
        return _on_main("the checkpoints cannot be read", self._search)

    def _search(self) -> Path | None:
        damaged: dict[Path, list[str]] = {}
        for path in reversed(self.found()):
            faults = atomic_folder.faults(path)
            if not faults:
                for each in damaged:
                    atomic_folder.set_aside(each)
                return path
            damaged[path] = faults
            say(f"{path} is damaged and not used: {'; '.join(faults)}")
        if damaged:
            raise CheckpointError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged; remove the folder to start over"
            )
        return None

    def path_for(self, progress: Progress) -> Path:
        return self._run_folder.checkpoint(progress.epochs, progress.step if progress.steps_in_epoch else None)

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        backbone: Backbone,
        settings: dict[str, Any],
        stored: Stored,
    ) -> Path:
        """Write a checkpoint; called on every rank. `settings` go to `model/coconut.json`.

        Raises CheckpointError on every rank if it cannot be written; earlier checkpoints stay unchanged.
        """
        path, found = self.path_for(stored.progress), self.found()
        remaining = f"the newest is {found[-1]}" if found else "there is no earlier one"
        failed = f"checkpoint {path.name} cannot be written ({remaining})"
        _on_main(failed, self._demand_space, engine)
        unfinished = _on_main(failed, atomic_folder.begin, path)
        try:
            _write_tensors(unfinished, engine, backbone, settings, stored, failed)
            _on_main(failed, _write_progress, unfinished, stored)
            _on_main(failed, self._publish, unfinished, stored.progress)
        except CheckpointError:
            if distributed.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return path

    def _demand_space(self, engine: deepspeed.DeepSpeedEngine) -> None:
        atomic_folder.sweep(self.folder)
        needed = (1 + len(states.MOMENTS)) * 4 * internals.n_elements(engine) + _SMALL_FILES
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{free / GIB:.2f} GiB are free, {needed / GIB:.2f} GiB are needed; free some space")

    def _publish(self, unfinished: Path, progress: Progress) -> None:
        path = atomic_folder.publish(unfinished)
        latest = self._run_folder.latest
        pointer = latest.with_suffix(".new")
        pointer.write_text(path.name + "\n", encoding="utf-8")
        atomic_folder.flush(pointer)
        pointer.replace(latest)
        atomic_folder.flush(self.folder)
        for old in self._superseded(progress):
            atomic_folder.remove(old)

    def _superseded(self, progress: Progress) -> list[Path]:
        found = self.found()
        if self._keep is None:
            return [path for path in found if is_within_epoch(path)][:-_KEPT_WITHIN_EPOCHS]
        return [path for path in found[: -self._keep] if path.name != progress.best_checkpoint]


def restore(path: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Restore optimizer, loss scale and random states; called on every rank.

    The engine must have been built on the checkpoint's weights. ZeRO file, precision and number of ranks may differ
    from those that saved it; with another number of ranks dropout draws other numbers.
    """
    stored = read_stored(path)
    # Files are mapped into memory, so a tensor is read when it is copied.
    weights = {f"{_PREFIX}{name}": value for name, value in stored_weights(path).items()}
    weights |= stored_window(str(path)) | stored_decoder(path)
    moments = {moment: load_file(path / f"{moment}.safetensors") for moment in states.MOMENTS if stored.updates}
    states.restore(engine, stored.updates, weights, moments)
    internals.restore_loss_scale(engine, stored.loss_scale)
    engine.global_steps = stored.progress.step
    _set_random_state(load_file(path / _RANDOM))


def demand_weights(path: Path, model: nn.Module) -> None:
    """Raise CheckpointError if a checkpoint lacks weights of a `model` that is to resume from it."""
    stored = {f"{_PREFIX}{name}" for name in stored_weights(path)}
    stored |= {*stored_window(str(path)), *stored_decoder(path)}
    if missing := [name for name in trained_parameters(model) if name not in stored]:
        raise CheckpointError(
            f"{path} has no {missing[0]} ({len(missing)} such weights): the run was started without them; give this "
            f"one another name, with load_model_path={path} to start from the same model"
        )


def _write_tensors(
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    backbone: Backbone,
    settings: dict[str, Any],
    stored: Stored,
    failed: str,
) -> None:
    """Gathers and writes one set of tensors at a time, so that rank 0 holds only one."""
    tensors = states.gather(engine)
    _on_main(failed, _demand_finite, tensors)
    own = {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}
    decoder = {name: value for name, value in tensors.items() if name.startswith(DECODER_PREFIX)}
    window = {name: value for name, value in tensors.items() if not name.startswith((_PREFIX, DECODER_PREFIX))}
    # Called on every rank, whose tensors are empty but on rank 0.
    _on_main(failed, write_decoder, decoder, folder)
    _on_main(failed, write_folder, folder / MODEL_FOLDER, backbone.model, backbone.tokenizer, settings, own, window)
    for moment in states.MOMENTS if stored.updates else ():
        watchdog.alive()
        tensors = states.gather(engine, moment)
        _on_main(failed, _demand_finite, tensors)
        _on_main(failed, save_file, tensors, folder / f"{moment}.safetensors")
    watchdog.alive()
    ranks = enumerate(distributed.gather_to_main(_random_state()) or ())
    random = {f"rank{rank}.{key}": value for rank, state in ranks for key, value in state.items()}
    _on_main(failed, save_file, random, folder / _RANDOM)


def _demand_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ArithmeticError: a run could not resume from such a checkpoint, and older ones are removed after it."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ArithmeticError(f"{name} holds values that are not finite; lower lr, or set max_grad_norm")


def _write_progress(folder: Path, stored: Stored) -> None:
    values = asdict(stored) | {"progress": _renamed(asdict(stored.progress), "steps_in_epoch", "windows")}
    (folder / _PROGRESS).write_text(strict_json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _on_main(failed: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Run `action` on rank 0 and return its value on every rank; raises CheckpointError on every rank if it fails."""
    value, problem = None, None
    if distributed.is_main():
        try:
            value = action(*arguments)
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:
            # tokenizers raises a bare Exception when the disk is full.
            if type(error) is not Exception and not isinstance(error, OSError | SafetensorError | ArithmeticError):
                traceback.print_exc()
            problem = f"{failed}: {error}"
    value, problem = distributed.from_main((value, problem))
    if problem is not None:
        raise CheckpointError(problem)
    return value


def _random_state() -> dict[str, torch.Tensor]:
    """Only dropout draws numbers in training; the order of the examples depends on seed and epoch alone."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if distributed.device().type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(saved: dict[str, torch.Tensor]) -> None:
    """Has no effect if another number of ranks saved them."""
    if f"rank{distributed.world_size()}.cpu" in saved or f"rank{distributed.world_size() - 1}.cpu" not in saved:
        return
    own = f"rank{distributed.rank()}"
    torch.set_rng_state(saved[f"{own}.cpu"])
    if distributed.device().type == "cuda" and f"{own}.cuda" in saved:
        torch.cuda.set_rng_state(saved[f"{own}.cuda"])
