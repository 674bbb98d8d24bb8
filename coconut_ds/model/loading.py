"""Loads a transformers model and its tokenizer from a folder or the hub, and rejects incomplete ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from coconut_ds.errors import ModelError, in_one_line
from coconut_ds.model.adapters import CONFIG_FILE, adapt, fingerprint, is_adapter, load_adapter, stored_lora
from coconut_ds.model.backbone import Backbone, add_markers, demand_plain_head, demand_rows
from coconut_ds.model.state_dicts import (
    PLAIN_NAMES,
    SECOND_TABLE,
    demand_finite,
    demand_plain_tensors,
    demand_whole,
    plain_name,
)


def load_backbone(name: str) -> Backbone:
    """Load a folder or a hub id; the hub is asked only for files that are neither in the folder nor in the cache.

    Raises ModelError, one line, if it cannot be loaded, is incomplete, or does not support Coconut.
    """
    if is_adapter(Path(name)):
        return _adapted(Path(name), load_backbone)
    backbone = Backbone(load_model(name), load_tokenizer(name))
    demand_rows(backbone.model, backbone.tokenizer, name)
    return backbone


def _adapted(folder: Path, load: Callable[[str], Backbone]) -> Backbone:
    """The base model of the adapters in `folder`, with them."""
    lora = stored_lora(folder)
    elsewhere = f"or copy {folder} to another place and name the base model in its {CONFIG_FILE}"
    try:
        base = load(lora.base)
    except ModelError as error:
        raise ModelError(
            f"{folder} holds adapters of {lora.base}, which cannot be loaded: {error}; {elsewhere}"
        ) from None
    if load is load_backbone and (found := fingerprint(base.model)) != lora.base_print:
        raise ModelError(
            f"{folder} holds adapters of another {lora.base}: its weights have the fingerprint {found[:12]}, the ones "
            f"they were trained on {lora.base_print[:12]}; put the model back, {elsewhere}"
        )
    add_markers(base)
    adapt(base.model, lora)
    if load is load_backbone:
        load_adapter(base.model, folder)
    # A folder that was saved without a tokenizer has that of its base.
    has_own = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return Backbone(base.model, load_tokenizer(str(folder)) if has_own else base.tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load_backbone` loads it."""
    tokenizer = _load(name, _tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token, which ends every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Raises OSError if the tokenizer files are missing: for some families transformers returns an empty tokenizer."""
    reason = "an empty vocabulary"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as error:
        reason = in_one_line(error, 100)
    raise OSError(
        f"no tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json of the model beside its config.json"
    )


def backbone_from_config(name: str) -> Backbone:
    """As `load_backbone`, with random weights: of a folder or hub id only config.json and the tokenizer are read.

    For results that depend on shapes alone, such as a memory plan.
    """
    if is_adapter(Path(name)):
        return _adapted(Path(name), backbone_from_config)
    return Backbone(model_of_config(name), load_tokenizer(name))


def model_of_config(name: str, n_more_tokens: int = 0, n_layers: int | None = None) -> PreTrainedModel:
    """The model alone, as torch initialises it, with a vocabulary of `n_more_tokens` more, and its first `n_layers`."""
    load = functools.partial(_untrained, n_more_tokens=n_more_tokens, n_layers=n_layers)
    model: PreTrainedModel = _load(name, load)
    demand_plain_head(model, name)
    return model


def _untrained(name: str, n_more_tokens: int = 0, n_layers: int | None = None, **options: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name, **options)
    text = config.get_text_config(decoder=True)
    text.vocab_size += n_more_tokens
    if n_layers is not None:
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:n_layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def load_model(name: str) -> PreTrainedModel:
    """The model alone, in fp32, as `load_backbone` loads it.

    Prefixes of wrappers in the names of its weights are ignored. Raises ModelError naming the weights that are
    missing, unexpected, misshaped or not finite: transformers itself initialises missing ones at random.
    """
    if is_adapter(Path(name)):
        return load_backbone(name).model
    load = AutoModelForCausalLM.from_pretrained
    # Mismatched sizes are reported below; otherwise the names would only be in a log.
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load(name, load, **options)
    if any(plain_name(key) != key for key in report["unexpected_keys"]):
        model, report = _load(name, load, **options, key_mapping=PLAIN_NAMES)
    demand_plain_head(model, name)
    _keep_own_head(model)
    misshaped = {key: f"{list(found)}, not {list(own)}" for key, found, own in sorted(report["mismatched_keys"])}
    # Published Coconut also stores its embedding table under a second name.
    unexpected = sorted(key for key in report["unexpected_keys"] if plain_name(key) != SECOND_TABLE)
    demand_whole(name, model, sorted(report["missing_keys"]), unexpected, misshaped)
    demand_plain_tensors(Path(name), model)
    demand_finite(name, dict(model.named_parameters()))
    return model


def _keep_own_head(model: PreTrainedModel) -> None:
    """Keep the head that a folder holds beside the embedding separate, whatever its configuration says of tying.

    transformers loads both, and would tie them when the embedding is resized.
    """
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def _load(name: str, load: Callable[..., Any], **options: Any) -> Any:
    # Explicit, because transformers asks on the terminal if it is not set.
    options["trust_remote_code"] = False
    _demand_weights_of_transformers(Path(name))
    try:
        return load(name, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:
        if Path(name).is_dir():
            raise ModelError(f"folder {name} is not a model for transformers: {in_one_line(error)}") from None
        if not isinstance(error, OSError | ValueError | SafetensorError):  # the files exist, but cannot be loaded
            raise ModelError(f"{name} cannot be loaded: {in_one_line(error)}") from None
    try:
        # One request with a time limit first: loading alone retries for minutes without a connection.
        HfApi().model_info(name, timeout=10)
        return load(name, **options)
    except Exception as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor in the cache, and the hub did not give it "
            f"({type(error).__name__}); download it elsewhere and set model_id to its folder, or use model_id: scratch"
        ) from None


def _demand_weights_of_transformers(folder: Path) -> None:
    """Raise ModelError, with the way out, for folders of weights in formats that only other tools read."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    shards = [folder] if any(folder.glob("*_states.pt")) else sorted(folder.glob("global_step*/"))
    if shards:
        top = shards[-1].parent
        command = f"python {quote(str(top / 'zero_to_fp32.py'))} {quote(str(top))} OUT"
        raise ModelError(
            f"{folder} is a DeepSpeed checkpoint, whose weights lie in pieces; put them together with the script that "
            f"DeepSpeed left there, `{command}`, and name the file in OUT, with model_id the model it was trained from"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter and not a model; merge it into its base model with peft's merge_and_unload "
            "and name the folder that is saved from it"
        )
