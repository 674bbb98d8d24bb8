"""Initial weights of a run: checkpoints, HF folders and hub ids, `.pt` state dicts of the published code."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from coconut_ds.config.data_paths import file_name
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import LoraConfig
from coconut_ds.data.markers import MARKERS
from coconut_ds.errors import InputError, problem_list
from coconut_ds.model.adapters import Lora, adapt, fingerprint, is_adapted
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.folder import MODEL_FOLDER, context_settings, model_folder, solver_settings, stored_settings
from coconut_ds.model.jacobi import Jacobi
from coconut_ds.model.latents import LatentContext
from coconut_ds.model.loading import backbone_from_config, load_backbone
from coconut_ds.model.state_dicts import SECOND_TABLE, demand_finite, demand_whole, is_plain, plain_name
from coconut_ds.runs import atomic_folder


def latent_settings(config: RunConfig) -> dict[str, Any]:
    """How a run makes thoughts, for `model/coconut.json`."""
    names = {"pad_latent_to_max", "max_latent_stage", "curriculum", "latent_norm", "latent_projection", "prompt_format"}
    values = config.model_dump(mode="json", include=names)
    context = {"latent_context": context_settings(latent_context(config)), "solver": solver_settings(solver(config))}
    return {"method": config.method, "c_thought": config.thoughts_per_step, **context, **values}


def solver(config: RunConfig) -> Jacobi | None:
    """The solver of a run, as an argument of the model."""
    return None if config.solver is None else Jacobi(config.solver.iterations, config.solver.gradient)


def latent_context(config: RunConfig) -> LatentContext:
    """The latent window and norm of a run, as arguments of the model."""
    window, norm, projection = config.latent_context, config.latent_norm, config.latent_projection
    if window is None:
        return LatentContext(norm=norm, projection=projection)
    return LatentContext(window.newest_first, window.scope, window.learned, norm, projection)


def origin(config: RunConfig) -> dict[str, Any]:
    """Facts for the model card: the run's name, data files and base model. File names only, no local paths."""
    paths = {"training": config.train_path, "validation": config.val_path}
    return {
        "name": config.name,
        "data": {split: file_name(path) for split, path in paths.items() if path},
        "max_new_tokens": config.max_new_tokens,
        "answer_match": config.answer_match,
        "base_model": _base_model(config),
    }


def source(config: RunConfig) -> str:
    """Where the weights come from: `scratch`, a folder or a hub id; for a `.pt` file its base model."""
    path = config.load_model_path
    return config.model_id if path is None or Path(path).is_file() else path


def _base_model(config: RunConfig) -> str | None:
    """The hub id that the weights come from; None if there is none or it is unknown."""
    name = source(config)
    if Path(name).exists():
        return (stored_settings(name) or {}).get("base_model")
    return None if name == "scratch" else name


def load_initial(
    model_id: str,
    path: str | None,
    has_thoughts: bool,
    from_scratch: Callable[[], Backbone] | None = None,
    with_weights: bool = True,
    lora: LoraConfig | None = None,
) -> Backbone:
    """The backbone to start from, with marker tokens if its method `has_thoughts`, and with adapters if `lora` says so.

    `path` names its weights: a checkpoint, an HF folder or hub id, or a `.pt` state dict as the published code saves
    it; None takes those of `model_id`. `from_scratch` builds the model of `model_id: scratch`. If not `with_weights`,
    the weights of a folder or hub id are random and need not exist. Raises InputError for a damaged checkpoint.
    """
    if path is not None:
        _demand_exists(Path(path))
        if with_weights:
            check_intact(Path(path))
    is_state_dict = path is not None and Path(path).is_file()
    load = load_backbone if with_weights else backbone_from_config
    if path is not None and not is_state_dict:
        backbone = load(str(model_folder(path)))
    elif model_id == "scratch":
        if from_scratch is None:
            raise InputError(
                "load_model_path: a state dict has no shape and model_id is scratch; name the model's folder"
            )
        backbone = from_scratch()
    else:
        backbone = load(model_id)
    if is_state_dict:
        _load_state_dict(backbone, str(path))
    if lora is not None and not is_adapted(backbone.model):
        if is_state_dict:
            raise InputError(
                f"lora: the base model must be a folder or a hub id, and {path} is a file; write a folder from it with "
                "python -m coconut_ds.export and name that"
            )
        base = model_id if path is None else str(model_folder(path))
        # Found from any working directory.
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
        return _adapted(backbone, lora, base, with_weights)
    if has_thoughts:
        add_markers(backbone)
    return backbone


def _adapted(backbone: Backbone, lora: LoraConfig, base: str, with_weights: bool) -> Backbone:
    """`backbone` with new adapters and, whatever its method, marker tokens: a run with thoughts may start from it."""
    base_print = fingerprint(backbone.model) if with_weights else ""
    add_markers(backbone)
    tokens = tuple(backbone.marker_ids().values()) if lora.trainable_tokens else ()
    adapt(backbone.model, Lora(lora.r, lora.alpha, lora.dropout, lora.targets, tokens, base, base_print))
    return backbone


def _demand_exists(path: Path) -> None:
    """Raise InputError for a missing path that cannot be a hub id, which has at most two parts."""
    if len(path.parts) > 2 and not path.exists():
        siblings = sorted(each.name for each in path.parent.glob("*/")) if path.parent.is_dir() else []
        instead = f"has {', '.join(siblings)}" if siblings else "has no folders either"
        raise InputError(f"load_model_path: {path} does not exist; {path.parent} {instead}")


def check_intact(source: Path) -> None:
    """Verify a run's checkpoint, or the one around a `model/` folder, against its manifest.

    Raises InputError listing every fault; other folders and hub ids pass.
    """
    is_inside = source.name == MODEL_FOLDER and (source.parent / atomic_folder.MANIFEST).is_file()
    checkpoint = source.parent if is_inside else source
    if (checkpoint / MODEL_FOLDER).is_dir() and (faults := atomic_folder.faults(checkpoint)):
        raise InputError(problem_list(f"{checkpoint} is damaged, name another checkpoint or copy it again", faults))


def _load_state_dict(backbone: Backbone, path: str) -> None:
    """Load a published state dict: keys with or without wrapper prefixes, with or without marker tokens."""
    state = _read_state_dict(path)
    model: Any = backbone.model
    table = model.get_input_embeddings().weight.data_ptr()
    names = [key for key, value in model.state_dict().items() if value.data_ptr() == table and key in state]
    n_rows = len(state[names[0]]) if names else 0
    # Published Coconut has exactly one row per token, even if its base model has spare rows.
    n_with_markers = len(backbone.tokenizer) + len(MARKERS)
    if n_rows == n_with_markers:
        add_markers(backbone)
        model.resize_token_embeddings(n_with_markers, mean_resizing=False)
    own = model.state_dict()
    _demand_one_head(path, model, state)
    # Of tied names one is enough.
    given = {own[key].data_ptr() for key in state if key in own}
    missing = [key for key, value in own.items() if key not in state and value.data_ptr() not in given]
    unexpected = [key for key in state if key not in own]
    misshaped = {
        key: f"{list(value.shape)} of {value.dtype}, not {list(own[key].shape)} of {own[key].dtype}"
        for key, value in state.items()
        if key in own and not _is_alike(value, own[key])
    }
    demand_whole(f"load_model_path: {path}", model, missing, unexpected, misshaped)
    demand_finite(f"load_model_path: {path}", state)
    model.load_state_dict(state, strict=False)


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one can be copied into the other; quantized weights mean nothing without their scales."""
    return one.shape == other.shape and is_plain(one) == is_plain(other)


def _demand_one_head(path: str, model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError if names of one tied weight have different values in `state`: one of them would win."""
    own, tied = model.state_dict(), defaultdict(list)
    for key in state:
        if key in own:
            tied[own[key].data_ptr()].append(key)
    for first, *others in tied.values():
        if any(_is_alike(state[first], state[key]) and not torch.equal(state[first], state[key]) for key in others):
            raise InputError(
                f"load_model_path: {path} has different values in {' and '.join([first, *others])}, which are one "
                f"weight in {model.config.model_type}; set tie_word_embeddings to false in config.json of the model_id"
            )


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _not_a_state_dict(path, error) from None
    if not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
        raise _not_a_state_dict(path, state)
    plain = {plain_name(key): value for key, value in state.items()}
    if len(plain) < len(state):
        raise InputError(f"load_model_path: {path} has weights twice, with and without prefixes; save one of them")
    # Published Coconut also stores its embedding table under a second name.
    plain.pop(SECOND_TABLE, None)
    return plain


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _not_a_state_dict(path: str, found: Any) -> InputError:
    hint = ""
    if path.endswith("_states.pt"):
        hint = (
            "; it is a shard of a DeepSpeed checkpoint: merge the shards with the script zero_to_fp32.py in the folder "
            "above them, and name the file it writes"
        )
    elif isinstance(found, dict):
        hint = _nested(path, found)
    return InputError(f"load_model_path: {path} is not a state dict of tensors ({type(found).__name__}){hint}")


def _nested(path: str, values: dict[Any, Any]) -> str:
    """Where the tensors of a nested dict are, or what stands beside them, and the command that extracts them."""
    others = [key for key, value in values.items() if not _is_named_tensor((key, value))]
    tensors = f"torch.load({path!r}, weights_only=True)"
    if keys := _path_to_tensors(values):
        place = "".join(f"[{key!r}]" for key in keys)
        advice, tensors = f"they are in {place}: extract them", f"{tensors}{place}"
    elif len(others) < len(values):
        advice = f"{others[:3]} are not tensors: extract the others"
        tensors = f"{{k: v for k, v in {tensors}.items() if torch.is_tensor(v)}}"
    else:
        return ""
    code = f"import torch; torch.save({tensors}, 'weights.pt')"
    return f"; {advice} with `python -c {shlex.quote(code)}` and name weights.pt"


def _path_to_tensors(values: Any) -> list[str] | None:
    """Keys that lead to the largest nested dict of tensors; None if there is none."""
    if not isinstance(values, dict):
        return None
    if values and all(isinstance(value, torch.Tensor) for value in values.values()):
        return []
    below = {key: found for key, value in values.items() if (found := _path_to_tensors(value)) is not None}
    if not below:
        return None
    key = max(below, key=lambda key: len(values[key]))
    return [key, *below[key]]
