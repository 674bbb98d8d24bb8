"""The folder of a trained model, local or on the hub: the files transformers loads, and the latent settings.

config.json, model.safetensors, tokenizer files    of the backbone
coconut.json                                       latent settings; of a run also method, stage, data and results
latent_window.safetensors                          if the window is learned, or thoughts are projected
README.md                                          the model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut_ds import strict_json
from coconut_ds.config.methods import METHODS
from coconut_ds.errors import InputError, in_one_line
from coconut_ds.model.adapters import ADAPTER_FILE, CONFIG_FILE, is_adapted, stored_adapter, write_adapter
from coconut_ds.model.backbone import trained_parameters
from coconut_ds.model.card import model_card
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.model.latents import LatentContext, LatentWindow
from coconut_ds.model.state_dicts import demand_finite
from coconut_ds.runs.paths import RunFolder

MODEL_FOLDER, WEIGHTS_FILE, WINDOW_FILE = "model", "model.safetensors", "latent_window.safetensors"
_SETTINGS_FILE, _CARD_FILE = "coconut.json", "README.md"
_WINDOW_PREFIX = "latent_window."
_ONE_FILE = "1TB"
_HUB_WAIT_S = 10


def model_folder(name: str) -> Path:
    """The model's folder in a checkpoint of a run; the path itself for anything else."""
    folder = Path(name)
    return folder / MODEL_FOLDER if (folder / MODEL_FOLDER).is_dir() else folder


def where_it_is(name: str) -> str:
    """The error message for a name that is not a Coconut model."""
    newest = RunFolder(Path(name)).found_checkpoints()
    if newest:
        return f"{name} is a run folder; name one of its checkpoints, the newest is {newest[-1]}"
    if Path(name).exists():
        return (
            f"{name} has no coconut.json, so it is not a Coconut model; build one around a plain model with "
            "Coconut(base_causallm, latent_token_id=..., ...)"
        )
    return f"{name}: there is no such folder, and loading a Coconut model of that name from the hub failed"


def write_folder(
    folder: Path,
    base_causallm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Mapping[str, Any] | None,
    weights: dict[str, torch.Tensor] | None = None,
    window: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the folder. `weights` replace those the backbone holds; `settings` go to `coconut.json`.

    A learned `window` gets a separate file, since transformers has no place for it.
    """
    # Counted first: under ZeRO-3 the model holds no weights, and saving empties `weights`.
    held = weights.values() if weights is not None else _trained(base_causallm).values()
    n_parameters = sum(each.numel() for each in held)
    if is_adapted(base_causallm):
        write_adapter(folder, base_causallm, _trained(base_causallm) if weights is None else weights)
    else:
        base_causallm.save_pretrained(folder, state_dict=weights, max_shard_size=_ONE_FILE)
    # Files of an earlier model in that folder would be read as this one's.
    others = (WEIGHTS_FILE,) if is_adapted(base_causallm) else (ADAPTER_FILE, CONFIG_FILE)
    for stale in (WINDOW_FILE, _SETTINGS_FILE, _CARD_FILE, *others):
        (folder / stale).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if window:
        save_file(window, folder / WINDOW_FILE)
    if settings is not None:
        (folder / _SETTINGS_FILE).write_text(strict_json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        adapted = is_adapted(base_causallm)
        backbone = (
            f"{base_causallm.config.model_type}, {'LoRA adapters of ' * adapted}{n_parameters / 1e6:.2f} M parameters"
        )
        (folder / _CARD_FILE).write_text(model_card(settings, backbone, adapted), encoding="utf-8")


def _trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in trained_parameters(model).items()}


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained weights of the backbone in a checkpoint of a run, by their names in it; mapped into memory."""
    folder = model_folder(str(checkpoint))
    return stored_adapter(folder) or load_file(folder / WEIGHTS_FILE)


def stored_settings(name: str) -> dict[str, Any] | None:
    """The `coconut.json` of a checkpoint, its `model/` folder, another folder or a hub id; None for other weights."""
    file = _stored_file(name, _SETTINGS_FILE)
    if file is None:
        return None
    try:
        # Early checkpoints lack settings that did not exist yet.
        filled: dict[str, Any] = {"latent_norm": "none", "latent_projection": None, "solver": None}
        settings = filled | json.loads(file.read_text(encoding="utf-8"))
        if "method" in settings:  # written by a run
            settings = {"curriculum": "forward", "prompt_format": "plain"} | settings
        context = latent_context(settings)
        if settings.get("latent_context"):
            settings["latent_context"] = context_settings(context)
        if settings.get("method") not in (None, *METHODS):
            raise ValueError(f"method {settings['method']!r} is not one of {', '.join(METHODS)}")
        solver_of(settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be used: {in_one_line(error)}; copy the folder again") from None
    return settings


def stored_window(name: str) -> dict[str, torch.Tensor]:
    """The trained parameters of the latent window, by name; empty for other weights.

    Raises InputError if the file is missing or has other parameters than the settings say.
    """
    settings = stored_settings(name)
    # A window without settings can only be learned weights.
    wanted = _names_in_window({"latent_context": {"learned": True}} if settings is None else settings)
    file = _stored_file(name, WINDOW_FILE)
    if file is not None:
        try:
            window = load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read: {in_one_line(error)}; copy the folder again") from None
        if set(window) != wanted:
            raise InputError(f"{file} must hold {sorted(wanted)}, found {sorted(window)}; copy the folder again")
        demand_finite(str(file), window)
        return window
    if settings is not None and wanted:
        raise InputError(f"{name} learned its latent window, and {WINDOW_FILE} is missing; copy the folder again")
    return {}


def _names_in_window(settings: Mapping[str, Any]) -> set[str]:
    return {f"{_WINDOW_PREFIX}{key}" for key in LatentWindow(latent_context(settings), size=1).state_dict()}


def load_window(window: LatentWindow, name: str) -> None:
    """Fill what `window` trains with what is stored with `name`, as far as that was trained, too.

    Raises InputError for a window or projection of another size.
    """
    if not window.state_dict():
        return
    stored = stored_window(name)
    for key, parameter in window.named_parameters():
        value = stored.get(f"{_WINDOW_PREFIX}{key}", parameter.data)
        if value.shape != parameter.shape:
            raise InputError(
                f"{name} learned {key} of shape {tuple(value.shape)}, the run's has "
                f"{tuple(parameter.shape)}; give latent_context the same number of weights and latent_projection the "
                "same size"
            )
        parameter.data.copy_(value)


def _stored_file(name: str, file: str) -> Path | None:
    if Path(name).exists():
        path = model_folder(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, local_files_only=True))
    except HFValidationError:  # a path
        return None
    except LocalEntryNotFoundError:
        pass
    try:
        # One request with a time limit first: a download alone retries for half a minute without a connection.
        HfApi().model_info(name, timeout=_HUB_WAIT_S)
        return Path(hf_hub_download(name, file))
    except Exception:  # no such file, no such repository, no connection: loading the weights says which
        return None


def context_settings(context: LatentContext) -> dict[str, Any] | None:
    """The window as stored in `coconut.json`; None for plain Coconut."""
    if context.reach == 1 and not context.learned:
        return None
    return {"weights": list(context.weights), "scope": context.scope, "learned": context.learned}


def solver_settings(solver: Jacobi | None) -> dict[str, Any] | None:
    """The solver as stored in `coconut.json`; None for one thought after another."""
    return None if solver is None else {"kind": "jacobi", "iterations": solver.iterations}


def solver_of(settings: Mapping[str, Any]) -> Jacobi | None:
    """The solver that `coconut.json` describes; files of earlier versions have none."""
    stored = settings.get("solver")
    if stored is None:
        return None
    if stored.get("kind") != "jacobi":
        raise ValueError(f"solver {stored!r} is of a kind that this version does not know")
    return Jacobi(stored.get("iterations", 0))


def latent_context(settings: Mapping[str, Any]) -> LatentContext:
    """The window that `coconut.json` describes."""
    window = settings.get("latent_context") or {}
    norm, projection = settings.get("latent_norm", "none"), settings.get("latent_projection")
    return LatentContext(**window, norm=norm, projection=projection)


def push(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Upload the folder and return its address; the repository is created if it does not exist.

    Raises InputError, one line, if the hub rejects it.
    """
    try:
        hub = HfApi()
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a Coconut model"))
    except Exception as error:  # no login, no network, no permission: all for the user to fix
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"push_to_hub: {repo_id} was not uploaded ({reason}); log in with `hf auth login`; {folder} is complete"
        ) from None
