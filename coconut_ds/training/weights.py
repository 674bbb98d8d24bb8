"""Weights a run starts from: checkpoints, HF folders and hub ids, `.pt` state dicts of the published code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coconut_ds.config import RunConfig
from coconut_ds.errors import InputError, problem_list
from coconut_ds.model.backbone import MARKERS, Backbone, add_markers, load_backbone
from coconut_ds.model.latents import LatentContext
from coconut_ds.model.pretrained import MODEL_FOLDER, context_settings, model_folder, stored_settings
from coconut_ds.training import sealed_folder

_WRAPPER_PREFIXES = ("module.", "_fsdp_wrapped_module.")


def latent_settings(config: RunConfig) -> dict[str, Any]:
    """How a run makes thoughts: stored in `model/coconut.json`, with the epochs and the stage the weights have seen."""
    values = config.model_dump(mode="json", include={"pad_latent_to_max", "max_latent_stage", "latent_norm"})
    context = config.latent_context
    window = None
    if context is not None:
        window = context_settings(LatentContext(context.newest_first, context.scope, context.learned))
    return {"method": config.method, "c_thought": config.thoughts_per_step, "latent_context": window, **values}


def origin(config: RunConfig) -> dict[str, Any]:
    """What the model card says of a run: its name, its data, the model it started from. No paths of this machine."""
    paths = {"training": config.train_path, "validation": config.val_path}
    return {
        "name": config.name,
        "data": {split: Path(path).name for split, path in paths.items() if path},
        "max_new_tokens": config.max_new_tokens,
        "base_model": _base_model(config),
    }


def source(config: RunConfig) -> str:
    """Where the weights come from: `scratch`, a folder or a hub id; of a `.pt` the model it was trained from."""
    path = config.load_model_path
    return config.model_id if path is None or Path(path).is_file() else path


def _base_model(config: RunConfig) -> str | None:
    """The hub id that the weights come from; None where there is none, or where nobody knows."""
    name = source(config)
    if Path(name).exists():
        return (stored_settings(name) or {}).get("base_model")
    return None if name == "scratch" else name


def load_initial(config: RunConfig, from_scratch: Callable[[], Backbone] | None = None) -> Backbone:
    """The backbone a run starts from, with marker tokens where its method uses them.

    `load_model_path` may be a checkpoint of ours, an HF folder or hub id, or a `.pt` state dict as the published code
    saves it. `from_scratch` makes the model of `model_id: scratch`. Raises InputError for a damaged checkpoint.
    """
    path = config.load_model_path
    if path is not None:
        _demand_there(Path(path))
        check_intact(Path(path))
    is_state_dict = path is not None and Path(path).is_file()
    if path is not None and not is_state_dict:
        backbone = load_backbone(str(model_folder(path)))
    elif config.model_id == "scratch":
        if from_scratch is None:
            raise InputError(
                "load_model_path: a state dict has no shape and model_id is scratch; name the model's folder"
            )
        backbone = from_scratch()
    else:
        backbone = load_backbone(config.model_id)
    if is_state_dict:
        _load_state_dict(backbone, str(path))
    if config.traits.thoughts != "none":
        add_markers(backbone)
    return backbone


def _demand_there(path: Path) -> None:
    """Raise InputError for what can be no hub id, which has two parts at most, and is not there."""
    if len(path.parts) > 2 and not path.exists():
        beside = sorted(each.name for each in path.parent.glob("*/")) if path.parent.is_dir() else []
        there = f"{path.parent} has {', '.join(beside)}" if beside else f"nor is there anything in {path.parent}"
        raise InputError(f"load_model_path: {path} is not there; {there}")


def check_intact(source: Path) -> None:
    """Hold a checkpoint of ours, or the one that a `model/` folder lies in, against its manifest.

    Raises InputError with every fault.
    """
    is_inside = source.name == MODEL_FOLDER and (source.parent / sealed_folder.MANIFEST).is_file()
    checkpoint = source.parent if is_inside else source
    if (checkpoint / MODEL_FOLDER).is_dir() and (faults := sealed_folder.faults(checkpoint)):
        raise InputError(problem_list(f"{checkpoint} is damaged, name another checkpoint or copy it again", faults))


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
