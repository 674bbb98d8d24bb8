"""Models with random weights (`model_id: scratch`) and the word-level tokenizer of their data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coconut_ds.model.backbone import Backbone


def scratch_backbone(
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_positions: int,
    dropout: float,
) -> Backbone:
    """A `gpt2` or `llama` with random weights (torch's global seed) for the tokenizer's vocabulary."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout},
        "llama": {"attention_dropout": dropout, "intermediate_size": 3 * n_embd, "pad_token_id": pad},
    }
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=n_embd,
        num_hidden_layers=n_layer,
        num_attention_heads=n_head,
        max_position_embeddings=n_positions,
        bos_token_id=eos,
        eos_token_id=eos,
        **own[architecture],
    )
    return Backbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer)


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
