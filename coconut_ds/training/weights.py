"""Weights in and out: the `model/` folder of a checkpoint, HF folders, `.pt` state dicts of the published code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coconut_ds.config import RunConfig
from coconut_ds.errors import InputError, problem_list
from coconut_ds.model.backbone import MARKERS, Backbone, add_markers, load_backbone
from coconut_ds.model.coconut import Coconut
from coconut_ds.training import sealed_folder

MODEL_FOLDER, WEIGHTS_FILE, WINDOW_FILE = "model", "model.safetensors", "latent_window.safetensors"
_SETTINGS = "coconut.json"
_WINDOW_NAME = "latent_window.logits"
_WRAPPER_PREFIXES = ("module.", "_fsdp_wrapped_module.")
_ONE_FILE = "1TB"


def export_model(
    folder: Path,
    backbone: Backbone,
    settings: dict[str, Any] | None,
    weights: dict[str, torch.Tensor] | None = None,
    window: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write safetensors, config, tokenizer and latent settings: a folder that plain transformers loads.

    `weights` take the place of those the model holds. A learned `window` gets a file of its own, since transformers
    has no place for it.
    """
    backbone.model.save_pretrained(folder, state_dict=weights, max_shard_size=_ONE_FILE)
    backbone.tokenizer.save_pretrained(folder)
    if window:
        save_file(window, folder / WINDOW_FILE)
    if settings is not None:
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def latent_settings(config: RunConfig) -> dict[str, Any]:
    """How a run makes thoughts: stored in `model/coconut.json`, with the epochs and the stage the weights have seen."""
    values = config.model_dump(mode="json", include={"pad_latent_to_max", "max_latent_stage", "latent_norm"})
    context = config.latent_context
    window = None
    if context is not None:
        window = {"weights": list(context.newest_first), "scope": context.scope, "learned": context.learned}
    return {"method": config.method, "c_thought": config.thoughts_per_step, "latent_context": window, **values}


def stored_settings(load_model_path: str) -> dict[str, Any] | None:
    """The `coconut.json` of a checkpoint or of its `model/` folder; None for other weights."""
    file = _model_folder(load_model_path) / _SETTINGS
    if not file.is_file():
        return None
    # Early checkpoints do not name what there was no choice in.
    settings = {"latent_norm": "none", **json.loads(file.read_text(encoding="utf-8"))}
    if settings.get("latent_context"):
        settings["latent_context"] = {"learned": False, **settings["latent_context"]}
    return settings


def stored_window(load_model_path: str) -> dict[str, torch.Tensor]:
    """What was learned of the latent window, by parameter name; empty for other weights."""
    file = _model_folder(load_model_path) / WINDOW_FILE
    return load_file(file) if file.is_file() else {}


def load_window(model: Coconut, load_model_path: str | None) -> None:
    """Go on from the window stored with `load_model_path`, where it is learned; else it starts as the run says.

    Raises InputError for a window of another size.
    """
    window = stored_window(load_model_path) if load_model_path else {}
    logits = model.latent_window.logits
    if logits is None or not window:
        return
    stored = window[_WINDOW_NAME]
    if stored.shape != logits.shape:
        raise InputError(
            f"load_model_path: {load_model_path} learned a window of {len(stored)} states, the run's has "
            f"{len(logits)}; give latent_context as many weights"
        )
    logits.data.copy_(stored)


def load_initial(config: RunConfig, from_scratch: Callable[[], Backbone] | None = None) -> Backbone:
    """The backbone a run starts from, with marker tokens where its method uses them.

    `load_model_path` may be a checkpoint of ours, an HF folder or hub id, or a `.pt` state dict as the published code
    saves it. `from_scratch` makes the model of `model_id: scratch`. Raises InputError for a damaged checkpoint.
    """
    source = config.load_model_path
    if source is not None:
        _check_intact(Path(source))
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
    if config.traits.thoughts != "none":
        add_markers(backbone)
    return backbone


def _check_intact(source: Path) -> None:
    """Hold a checkpoint of ours, or the one that a `model/` folder lies in, against its manifest."""
    is_inside = source.name == MODEL_FOLDER and (source.parent / sealed_folder.MANIFEST).is_file()
    checkpoint = source.parent if is_inside else source
    if (checkpoint / MODEL_FOLDER).is_dir() and (faults := sealed_folder.faults(checkpoint)):
        raise InputError(problem_list(f"load_model_path: {checkpoint} is damaged", faults))


def _model_folder(path: str) -> Path:
    folder = Path(path)
    return folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder


def _load_state_dict(backbone: Backbone, path: str) -> None:
    """Load a published `.pt`: keys with or without `base_causallm.` and a wrapper's prefix, with or without markers."""
    state = _read_state_dict(path)
    model: Any = backbone.model
    name = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    n_rows = len(state[name]) if name in state else 0
    # Published Coconut has a row for each token and no more, also where the model it starts from has spare ones.
    n_with_markers = len(backbone.tokenizer) + len(MARKERS)
    if n_rows == n_with_markers:
        add_markers(backbone)
        model.resize_token_embeddings(n_with_markers, mean_resizing=False)
    own = model.state_dict()
    tied = set(own) - {key for key, _ in model.named_parameters()}
    missing = [key for key in own if key not in state and key not in tied]
    unexpected = [key for key in state if key not in own]
    misshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or misshaped:
        raise InputError(
            f"load_model_path: {path} does not fit {model.config.model_type}: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of another shape {misshaped[:3]}; set model_id to the model it was trained "
            "from"
        )
    model.load_state_dict(state, strict=False)


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"load_model_path: {path} is not a state dict of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"load_model_path: {path} is not a state dict of tensors ({type(state).__name__})")
    for prefix in (*_WRAPPER_PREFIXES, "base_causallm."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # Published Coconut also stores its embedding table under a second name.
    state.pop("embedding.weight", None)
    return state
