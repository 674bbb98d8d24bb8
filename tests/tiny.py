"""Small models, vocabularies and data for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prosqa
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from coconut_ds import Coconut, LatentContext
from coconut_ds.data.batches import Batch, Tokens, collate_training, training_sequence
from coconut_ds.data.stages import Layout
from coconut_ds.model import fast
from coconut_ds.model.adapters import Lora, adapt

PAD, EOS, START, END, LATENT, VOCABULARY = 0, 1, 2, 3, 4, 40
LORA = Lora(r=4, alpha=8, tokens=(START, END, LATENT))


def backbone(family: str, dropout: float = 0.0, n_layer: int = 2) -> PreTrainedModel:
    """A small model with large random weights, so that differences show."""
    shape = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": EOS, "eos_token_id": EOS}
    if family == "gpt2":
        rates = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=n_layer, n_head=4, n_positions=96, **rates, **shape))
    config_class, model_class = _FAMILIES[family]
    own = {"qwen3": {"head_dim": 8}, "mistral": {"sliding_window": 5}}.get(family, {})
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layer,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        attention_dropout=dropout,
        pad_token_id=PAD,
        **own,
        **shape,
    )
    return model_class(config)


_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def coconut(
    family: str = "gpt2",
    context: LatentContext | None = None,
    dropout: float = 0.0,
    n_layer: int = 2,
    plain: bool = False,
    lora: Lora | None = None,
) -> Coconut:
    """With the speed layer that the trainer installs, unless `plain`; adapters of `lora` are random, B as well."""
    torch.manual_seed(0)
    base = backbone(family, dropout, n_layer)
    if lora is not None:
        adapt(base, lora)
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model = Coconut(
        base,
        latent_token_id=LATENT,
        start_latent_id=START,
        end_latent_id=END,
        eos_token_id=EOS,
        latent_context=context,
    )
    if not plain:
        fast.install(model)
    return model


def row(n_question: int, steps: list[int], n_answer: int, seed: int) -> dict[str, list]:
    """A tokenized example with random ordinary tokens; `steps` are lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (count,), generator=generator).tolist()

    return {
        "question_ids": draw(n_question),
        "steps_ids": [draw(count) for count in steps],
        "answer_ids": [*draw(n_answer), EOS],
    }


def batch_of(shapes: Sequence[tuple[int, int, int]]) -> Batch:
    """A batch of coconut with (question tokens, skipped steps, thoughts) for each row; steps of 3, 4 and 5 tokens."""
    tokens = Tokens(PAD, START, END, LATENT)
    rows = [row(question, [3, 4, 5], 4, seed) for seed, (question, _, _) in enumerate(shapes)]
    layouts = [Layout(n_skip, n_thoughts) for _, n_skip, n_thoughts in shapes]
    sequences = [training_sequence(each, layout, tokens) for each, layout in zip(rows, layouts)]
    return collate_training(sequences, list(range(len(rows))), PAD)


def write_symbolic(folder: Path, n_train: int, n_valid: int, seed: int = 0) -> None:
    """Write prosqa_train.json and prosqa_valid.json of two-step questions."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"n_nodes": 6, "min_steps": 2, "max_steps": 2, "form": "symbolic"}
    for split, count in (("train", n_train), ("valid", n_valid)):
        records = list(prosqa.generate(count, f"{seed}/{split}", **shape))
        (folder / f"prosqa_{split}.json").write_text(json.dumps(records), encoding="utf-8")


def run(folder: Path) -> dict[str, Any]:
    """Values of a run that trains a model of one layer on a few two-step questions, written to `folder`."""
    write_symbolic(folder, n_train=8, n_valid=4)
    return {
        "coconut": True,
        "max_latent_stage": 2,
        "model_id": "scratch",
        "model": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64},
        "train_path": str(folder / "prosqa_train.json"),
        "val_path": str(folder / "prosqa_valid.json"),
        "max_new_tokens": 4,
    }
