"""Models with random weights (`model_id: scratch`) and the word-level tokenizer of their data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from coconut_ds.model.backbone import Backbone


def scratch_backbone(architecture: str, tokenizer: PreTrainedTokenizerBase, **shape: Any) -> Backbone:
    """A model with random weights (torch's global seed) for the tokenizer's vocabulary.

    `shape`: n_layer, n_embd, n_head, n_positions, dropout.
    """
    config = _SCRATCH_CONFIGS[architecture](tokenizer, **shape)
    return Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer)


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
