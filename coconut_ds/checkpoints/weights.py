"""Weights a run starts from: checkpoints, HF folders and hub ids, `.pt` state dicts of the published code."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.markers import MARKERS
from coconut_ds.errors import InputError, problem_list
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.folder import MODEL_FOLDER, context_settings, model_folder, stored_settings
from coconut_ds.model.latents import LatentContext
from coconut_ds.model.loading import backbone_from_config, load_backbone
from coconut_ds.model.state_dicts import SECOND_TABLE, demand_finite, demand_whole, is_plain, plain_name
from coconut_ds.runs import atomic_folder


def latent_settings(config: RunConfig) -> dict[str, Any]:
    """How a run makes thoughts: stored in `model/coconut.json`, with the epochs and the stage the weights have seen."""
    values = config.model_dump(mode="json", include={"pad_latent_to_max", "max_latent_stage", "latent_norm"})
    window = context_settings(latent_context(config))
    return {"method": config.method, "c_thought": config.thoughts_per_step, "latent_context": window, **values}


def latent_context(config: RunConfig) -> LatentContext:
    """The latent window and the norm of a run, as the model takes them."""
    window = config.latent_context
    if window is None:
        return LatentContext(norm=config.latent_norm)
    return LatentContext(window.newest_first, window.scope, window.learned, config.latent_norm)


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


def load_initial(
    model_id: str,
    path: str | None,
    has_thoughts: bool,
    from_scratch: Callable[[], Backbone] | None = None,
    with_weights: bool = True,
) -> Backbone:
    """The backbone to start from, with marker tokens if its method `has_thoughts`.

    `path` leads to its weights, and may be a checkpoint, an HF folder or hub id, or a `.pt` state dict as the published
    code saves it; None takes those of `model_id`. `from_scratch` makes the model of `model_id: scratch`. Without
    weights those of a folder or hub id are random and need not be there. Raises InputError for a damaged checkpoint.
    """
    if path is not None:
        _demand_there(Path(path))
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
    if has_thoughts:
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
    is_inside = source.name == MODEL_FOLDER and (source.parent / atomic_folder.MANIFEST).is_file()
    checkpoint = source.parent if is_inside else source
    if (checkpoint / MODEL_FOLDER).is_dir() and (faults := atomic_folder.faults(checkpoint)):
        raise InputError(problem_list(f"{checkpoint} is damaged, name another checkpoint or copy it again", faults))


def _load_state_dict(backbone: Backbone, path: str) -> None:
    """Load a published state dict: keys with or without prefixes of wrappers, with or without marker tokens."""
    state = _read_state_dict(path)
    model: Any = backbone.model
    table = model.get_input_embeddings().weight.data_ptr()
    n_rows = next((len(state[key]) for key, place in _places(model) if place == table and key in state), 0)
    # Published Coconut has a row for each token and no more, also where the model it starts from has spare ones.
    n_with_markers = len(backbone.tokenizer) + len(MARKERS)
    if n_rows == n_with_markers:
        add_markers(backbone)
        model.resize_token_embeddings(n_with_markers, mean_resizing=False)
    own = model.state_dict()
    _demand_one_head(path, model, state)
    # Of names for one tensor one is enough.
    there = {own[key].data_ptr() for key in state if key in own}
    missing = [key for key, value in own.items() if key not in state and value.data_ptr() not in there]
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
    """Whether one can be copied into the other; numbers of quantized weights mean nothing by themselves."""
    return one.shape == other.shape and is_plain(one) == is_plain(other)


def _demand_one_head(path: str, model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError where a model whose head is its embedding would get two tables, of which one would win."""
    for own in _tied_names(model):
        first, *others = [key for key in state if key in own] or [""]
        if any(_is_alike(state[first], state[key]) and not torch.equal(state[first], state[key]) for key in others):
            names = [first, *others]
            raise InputError(
                f"load_model_path: {path} has different values in {' and '.join(names)}, which are one weight in "
                f"{model.config.model_type}; set tie_word_embeddings to false in config.json of the model_id"
            )


def _tied_names(model: Any) -> list[list[str]]:
    """Names of the weights that go by several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, place in _places(model):
        names[place].append(name)
    return [each for each in names.values() if len(each) > 1]


def _places(model: Any) -> list[tuple[str, int]]:
    """Each name of a weight and the address of its values."""
    return [(name, value.data_ptr()) for name, value in model.state_dict().items()]


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = f"is not a state dict of tensors ({type(error).__name__})"
        raise InputError(f"load_model_path: {path} {problem}{_of_deepspeed(path)}") from None
    if not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
        problem = f"is not a state dict of tensors ({type(state).__name__})"
        raise InputError(f"load_model_path: {path} {problem}{_of_deepspeed(path) or _nested(path, state)}")
    plain = {plain_name(key): value for key, value in state.items()}
    if len(plain) < len(state):
        raise InputError(f"load_model_path: {path} has weights twice, with and without prefixes; save one of them")
    # Published Coconut also stores its embedding table under a second name.
    plain.pop(SECOND_TABLE, None)
    return plain


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _of_deepspeed(path: str) -> str:
    if not path.endswith("_states.pt"):
        return ""
    return (
        "; it is a piece of a DeepSpeed checkpoint: put the pieces together with the script zero_to_fp32.py that "
        "DeepSpeed left above them, and name the file it makes"
    )


def _nested(path: str, values: Any) -> str:
    """Where in a dict of dicts the tensors are, or what is beside them, and how to take them out."""
    if not isinstance(values, dict):
        return ""
    keys = _path_to_tensors(values)
    if keys:
        place = "".join(f"[{key!r}]" for key in keys)
        return f"; they are in {place}: {_taken_out(f'torch.load({path!r}, weights_only=True){place}')}"
    others = [key for key, value in values.items() if not _is_named_tensor((key, value))]
    if len(others) == len(values):
        return ""
    tensors = f"{{k: v for k, v in torch.load({path!r}, weights_only=True).items() if torch.is_tensor(v)}}"
    return f"; {others[:3]} are none: {_taken_out(tensors)}"


def _taken_out(tensors: str) -> str:
    code = f"import torch; torch.save({tensors}, 'weights.pt')"
    return f"take them out with `python -c {shlex.quote(code)}` and name weights.pt"


def _path_to_tensors(values: Any) -> list[str] | None:
    """Keys that lead to the largest dict of tensors inside of dicts; None where there is none."""
    if not isinstance(values, dict):
        return None
    if values and all(isinstance(value, torch.Tensor) for value in values.values()):
        return []
    below = {key: found for key, value in values.items() if (found := _path_to_tensors(value)) is not None}
    if not below:
        return None
    key = max(below, key=lambda key: len(values[key]))
    return [key, *below[key]]
