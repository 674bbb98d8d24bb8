"""Checkpoints: DeepSpeed's shards for an exact restart, and a `model/` folder that plain transformers loads.

    checkpoints/epoch_0003/
        deepspeed/       shards of every rank
        rank0.pt ...     random number states
        model/           safetensors, config, tokenizer, coconut.json
        progress.json    where the run stands

A checkpoint is written under a temporary name and renamed when every rank is done with it, so a folder with its real
name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch.optim.lr_scheduler import LRScheduler

from coconut_ds import distributed
from coconut_ds.config import RunConfig
from coconut_ds.errors import InputError
from coconut_ds.model.backbone import MARKERS, Backbone, add_markers, load_backbone

_SHARDS, _MODEL, _PROGRESS, _SETTINGS = "deepspeed", "model", "progress.json", "coconut.json"
_WRAPPER_PREFIXES = ("module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: epochs finished, optimizer steps done, and the best accuracy so far."""

    epochs: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_checkpoint: str | None = None
    schedule: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, keep: int | None):
        self.folder = run_folder / "checkpoints"
        self._keep = keep

    def found(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob("epoch_*[0-9]")) if self.folder.is_dir() else []

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it."""
        found = self.found()
        return distributed.from_main(found[-1] if found else None)

    def path_for(self, epochs: int) -> Path:
        return self.folder / f"epoch_{epochs:04d}"

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        backbone: Backbone,
        settings: dict[str, Any],
        schedule: LRScheduler,
        progress: Progress,
    ) -> Path:
        """Write a checkpoint; called on every rank. `settings` go to `model/coconut.json`."""
        path = self.path_for(progress.epochs)
        unfinished = path.with_name(path.name + ".tmp")
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        distributed.barrier()
        engine.save_checkpoint(str(unfinished), tag=_SHARDS, save_latest=False)
        torch.save(_random_states(), unfinished / f"rank{distributed.rank()}.pt")
        weights = _full_precision_weights(engine)
        if distributed.is_main():
            export_model(unfinished / _MODEL, backbone, settings, weights)
            progress = replace(progress, schedule=schedule.state_dict())
            (unfinished / _PROGRESS).write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
        distributed.barrier()
        if distributed.is_main():
            if path.exists():
                shutil.rmtree(path)
            os.replace(unfinished, path)
            self._prune(progress)
        distributed.barrier()
        return path

    def restore(self, path: Path, engine: deepspeed.DeepSpeedEngine, schedule: LRScheduler) -> None:
        """Bring engine, schedule and random numbers back to where they were; called on every rank.

        Raises InputError when the checkpoint was made by another number of ranks or another ZeRO stage.
        """
        states = path / f"rank{distributed.rank()}.pt"
        n_ranks = len(list(path.glob("rank*.pt")))
        if n_ranks != distributed.world_size():
            raise InputError(
                f"{path}: written by {n_ranks} ranks, this run has {distributed.world_size()}; start it with as many, "
                f"or start another run from its weights: load_model_path={path}"
            )
        try:
            loaded, _ = engine.load_checkpoint(str(path), tag=_SHARDS)
        except (AssertionError, AttributeError, FileNotFoundError) as error:
            # What DeepSpeed raises on shards of another ZeRO stage or precision.
            raise InputError(
                f"{path}: its optimizer states do not fit this ZeRO stage or precision ({error}); use the ds JSON it "
                f"was made with, or start another run from its weights: load_model_path={path}"
            ) from error
        if loaded is None:
            raise InputError(f"{path}: DeepSpeed found no shards in it")
        _set_random_states(torch.load(states, weights_only=True))
        schedule.load_state_dict(read_progress(path).schedule)

    def _prune(self, progress: Progress) -> None:
        if self._keep is None:
            return
        for path in self.found()[: -self._keep]:
            if path.name != progress.best_checkpoint:
                shutil.rmtree(path)


def read_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / _PROGRESS).read_text(encoding="utf-8")))


def export_model(folder: Path, backbone: Backbone, settings: dict[str, Any], weights: dict | None = None) -> None:
    """Write safetensors, config, tokenizer and latent settings: a folder that plain transformers loads."""
    backbone.model.save_pretrained(folder, state_dict=weights)
    backbone.tokenizer.save_pretrained(folder)
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def latent_settings(config: RunConfig) -> dict[str, Any]:
    """How a run makes thoughts: stored in `model/coconut.json`, with the epochs and the stage the weights have seen."""
    values = config.model_dump(mode="json", include={"pad_latent_to_max", "max_latent_stage", "latent_context"})
    return {"method": config.method, "c_thought": config.thoughts_per_step, **values}


def stored_settings(load_model_path: str) -> dict[str, Any] | None:
    """The `coconut.json` of a checkpoint or of its `model/` folder; None for other weights."""
    file = _model_folder(load_model_path) / _SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def load_initial(config: RunConfig, from_scratch: Callable[[], Backbone] | None = None) -> Backbone:
    """The backbone a run starts from, with marker tokens where its method uses them.

    `load_model_path` may be a checkpoint of ours, an HF folder or hub id, or a `.pt` state dict as the published code
    saves it. `from_scratch` makes the model of `model_id: scratch`.
    """
    source = config.load_model_path
    is_state_dict = source is not None and Path(source).is_file()
    if source is not None and not is_state_dict:
        backbone = load_backbone(str(_model_folder(source)))
    elif config.model_id == "scratch":
        if from_scratch is None:
            raise InputError(
                "load_model_path: a state dict has no shape and model_id is scratch; name the model's folder"
            )
        backbone = from_scratch()
    else:
        backbone = load_backbone(config.model_id)
    if is_state_dict:
        _load_state_dict(backbone, str(source))
    if config.uses_markers:
        add_markers(backbone)
    return backbone


def _model_folder(path: str) -> Path:
    folder = Path(path)
    return folder / _MODEL if (folder / _MODEL).is_dir() else folder


def _load_state_dict(backbone: Backbone, path: str) -> None:
    """Load a published `.pt`: keys with or without `base_causallm.` and a wrapper's prefix, with or without markers."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"load_model_path: {path} is not a state dict of tensors ({type(error).__name__})") from None
    for prefix in (*_WRAPPER_PREFIXES, "base_causallm."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # Published Coconut also stores its embedding table under a second name.
    state.pop("embedding.weight", None)
    model: Any = backbone.model
    name = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    n_rows = state[name].shape[0] if name in state else None
    n_own = model.get_input_embeddings().num_embeddings
    if n_rows == n_own + len(MARKERS):
        add_markers(backbone)
    missing, unexpected = model.load_state_dict(state, strict=False) if n_rows else (["every weight"], [])
    tied = set(model.state_dict()) - {key for key, _ in model.named_parameters()}
    missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        raise InputError(
            f"load_model_path: {path} does not fit {model.config.model_type}: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}; set model_id to the model it was trained from"
        )


def _full_precision_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """fp32 master weights of a bf16 or fp16 run, gathered on every rank; None where the module holds fp32 itself."""
    model = engine.module.base_causallm
    if next(model.parameters()).dtype == torch.float32:
        return None
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in model.named_parameters()}
    return {name: value.cpu() for name, value in weights.items()}


def _random_states() -> dict[str, Any]:
    """Dropout is all that draws numbers while training; the order of the examples depends on seed and epoch alone."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
