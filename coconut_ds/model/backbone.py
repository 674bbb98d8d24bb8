"""The HF model under Coconut and its tokenizer: from a hub id, a folder, or from scratch; marker tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from coconut_ds.errors import InputError

START_LATENT, END_LATENT, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
MARKERS = (START_LATENT, END_LATENT, LATENT)
_MARKERS_START_FROM = "<<"

_PROCESSED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class ModelError(InputError):
    """A model that cannot be loaded or cannot carry Coconut."""


@dataclass(frozen=True)
class Backbone:
    """A causal language model in fp32 and its tokenizer, which has an EOS and a padding token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def n_positions(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return int(self.model.config.max_position_embeddings)

    def marker_ids(self) -> dict[str, int]:
        """Ids of the marker tokens; raises KeyError when they were not added."""
        return marker_ids(self.tokenizer)


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the marker tokens; raises KeyError when they were not added."""
    vocabulary = tokenizer.get_vocab()
    return {marker: vocabulary[marker] for marker in MARKERS}


def load_backbone(name: str) -> Backbone:
    """Load a folder or a hub id; the hub is asked only for what neither the folder nor the cache has.

    Raises ModelError, one line, when it cannot be had or cannot carry Coconut.
    """
    return Backbone(load_model(name), load_tokenizer(name))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load_backbone` loads it."""
    tokenizer = _load(name, AutoTokenizer.from_pretrained)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token, which ends every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str) -> PreTrainedModel:
    """The model alone, in fp32, as `load_backbone` loads it."""
    model = _load(name, AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    _check(model, name)
    return model


def _load(name: str, load: Callable[..., Any], **options: Any) -> Any:
    # Said, because transformers asks on the terminal where it is not.
    options["trust_remote_code"] = False
    try:
        return load(name, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(name).is_dir():
            raise ModelError(f"folder {name} is not a model for transformers: {_first_line(error)}") from None
    try:
        # One request with a time limit first: loading alone would retry for minutes where the hub cannot be reached.
        HfApi().model_info(name, timeout=10)
        return load(name, **options)
    except Exception as error:
        raise ModelError(
            f"{name!r} is neither a folder here nor in the cache, and the hub did not give it "
            f"({type(error).__name__}); download it elsewhere and set model_id to its folder, or use model_id: scratch"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check(model: PreTrainedModel, name: str) -> None:
    for key in _PROCESSED_LOGITS:
        if getattr(model.config, key, None) not in (None, 1.0):
            raise ModelError(f"{name} changes its logits after the LM head ({key}); not supported")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ModelError(f"{name} has no separate LM head; not supported")


def scratch_backbone(architecture: str, tokenizer: PreTrainedTokenizerBase, **shape: Any) -> Backbone:
    """A model with random weights (torch's global seed) for the tokenizer's vocabulary.

    `shape`: n_layer, n_embd, n_head, n_positions, dropout.
    """
    config = _SCRATCH_CONFIGS[architecture](tokenizer, **shape)
    return Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer)


def fuse_gelu(model: PreTrainedModel) -> None:
    """GPT-2 spells its GELU out in eight operations, which keep four tensors of the MLP's width; torch's keeps one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def _gpt2_config(tokenizer: PreTrainedTokenizerBase, dropout: float, **shape: Any) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


def _llama_config(
    tokenizer: PreTrainedTokenizerBase, n_layer: int, n_embd: int, n_head: int, n_positions: int, dropout: float
) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=n_embd,
        intermediate_size=3 * n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        max_position_embeddings=n_positions,
        attention_dropout=dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


_SCRATCH_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"gpt2": _gpt2_config, "llama": _llama_config}


def word_tokenizer(texts: Iterable[str], n_positions: int) -> PreTrainedTokenizerBase:
    """A word-level tokenizer whose vocabulary is every word, punctuation mark and newline of `texts`.

    Words carry the space before them, and the first word of a text gets one, so that a word is the same token
    everywhere; decoding gives the text back.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"\n|(?<=\w)[.,;:!?]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("\n▁", "\n"), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    special = ["<|endoftext|>", "<|pad|>", "<|unknown|>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, vocab_size=2**31 - 1, show_progress=False)
    tokenizer.train_from_iterator(["###", *(text + "\n" for text in sorted(set(texts)))], trainer)
    eos, pad, unknown = special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def add_markers(backbone: Backbone) -> None:
    """Add the marker tokens; their rows start from `<<` where the vocabulary has it, else from the mean row.

    Nothing happens to a model that has them already.
    """
    model, tokenizer = backbone.model, backbone.tokenizer
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocabulary]
    if not missing:
        return
    source = vocabulary.get(_MARKERS_START_FROM)
    n_before = len(tokenizer)
    tokenizer.add_tokens(missing)
    embeddings: Any = model.get_input_embeddings()
    if embeddings.num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [tokenizer.get_vocab()[marker] for marker in missing]
    tables: list[Any] = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not tables[0]:
        tables.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for weight in tables:
            weight[new] = weight[source].clone() if source is not None else weight[:n_before].mean(dim=0)
