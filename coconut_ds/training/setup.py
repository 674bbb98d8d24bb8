"""Loads and validates the data and the model of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from coconut_ds.checkpoints.weights import latent_context, load_initial, solver
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.sections import ActivationCheckpointingConfig, ScratchModelConfig
from coconut_ds.data.answers import answer_line
from coconut_ds.data.batches import Tokens
from coconut_ds.data.doubts import doubts, long_chains, shared_questions
from coconut_ds.data.files import DataError, DataSet, Source, Split, read_set
from coconut_ds.data.plain_text import demand_plain_text
from coconut_ds.data.prompts import PromptFormat
from coconut_ds.data.records import check_lengths, tokenize
from coconut_ds.data.stages import Curriculum
from coconut_ds.data.step_targets import check_written_lengths
from coconut_ds.data.teacher import check_taught_lengths
from coconut_ds.errors import InputError
from coconut_ds.memory.model_states import Elements
from coconut_ds.model import fast
from coconut_ds.model.adapters import Lora, difference, is_adapted
from coconut_ds.model.backbone import Backbone
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.distillation import Distillation
from coconut_ds.model.folder import load_window, stored_settings
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer
from coconut_ds.model.step_decoder import copy_of, load_decoder
from coconut_ds.runtime import distributed

DEBUG_EXAMPLES = 32
"""Of an evaluated set, with `debug`."""
_DEBUG_TRAIN = 5000


@dataclass(frozen=True)
class Setup:
    """Data and model of a run, before its engine is built."""

    curriculum: Curriculum
    backbone: Backbone
    model: Coconut
    tokens: Tokens
    train_set: Dataset
    valid_set: Dataset
    hashes: tuple[str | None, str | None]
    """Of the two sets, for one that is no file."""
    n_parameters: int
    """Counted before an engine partitions them, like the next one."""
    n_trained: int
    doubts: tuple[str, ...]
    """Warnings about the data, a line each; on rank 0 only."""


def load_setup(
    config: RunConfig,
    weights: str | None,
    checkpointing: ActivationCheckpointingConfig,
    with_weights: bool = True,
) -> Setup:
    """Read data and model; `weights` as in `load_initial`. Raises InputError for whatever is wrong with them.

    `with_weights=False`: of a folder or hub id the weights need not be there, the model's are random.
    """
    train = read_set(Source.of(config, "train"), _DEBUG_TRAIN if config.debug else None)
    valid = read_set(Source.of(config, "val"), DEBUG_EXAMPLES if config.debug else None)
    backbone = load_initial(
        config.model_id,
        weights,
        config.traits.thoughts != "none",
        lambda: _scratch(config.model, train.records),
        with_weights,
        config.lora,
    )
    _demand_same_adapters(config, backbone, weights)
    curriculum = Curriculum.of(config)
    train_set = tokenized(train, backbone, curriculum, config.max_new_tokens, config.prompt_format)
    valid_set = tokenized(valid, backbone, curriculum, config.max_new_tokens, config.prompt_format)
    model, tokens = build_coconut(config, backbone, weights if with_weights else None, checkpointing, is_trained=True)
    _demand_facts(config, tokens, train_set)
    if tokens.step_end is not None:
        check_written_lengths(train.name, train_set, curriculum, tokens.step_end, backbone.n_positions)
    if tokens.reads_steps:
        check_taught_lengths(train.name, train_set, tokens.omits_last_step, backbone.n_positions)
    elements = Elements.of(model)
    n_trained = sum(elements.trained)
    found = []
    if distributed.is_main():
        found += _left_out(config, weights)
        tokenizer = backbone.tokenizer
        found += doubts(train, train_set, tokenizer, is_evaluated=False)
        if config.traits.steps == "replaced by stage":
            found += long_chains(train, config.max_latent_stage)
        found += doubts(valid, valid_set, tokenizer, is_evaluated=True)
        found += shared_questions(valid, train)
        if config.test_path is not None:
            found += shared_questions(set_if_any(config, "test"), train)
    hashes = (train.sha256, valid.sha256)
    return Setup(
        curriculum,
        backbone,
        model,
        tokens,
        train_set,
        valid_set,
        hashes,
        n_trained + elements.frozen,
        n_trained,
        tuple(found),
    )


def _demand_same_adapters(config: RunConfig, backbone: Backbone, weights: str | None) -> None:
    """Raise InputError for weights with adapters that are not those of the run."""
    if not is_adapted(backbone.model):
        return
    name = weights or config.model_id
    if config.lora is None:
        raise InputError(
            f"{name} holds LoRA adapters, and this run trains all weights; set lora, or merge them first: python -m "
            f"coconut_ds.export {name} OUT"
        )
    tokens = tuple(backbone.marker_ids().values()) if config.lora.trainable_tokens else ()
    wanted = Lora(config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.targets, tokens)
    if differing := difference(backbone.model, wanted):
        raise InputError(
            f"{differing}, in the adapters of {name}; set what they have, or merge them first: python -m "
            f"coconut_ds.export {name} OUT"
        )


def _left_out(config: RunConfig, weights: str | None) -> list[str]:
    """What is trained beside the backbone in `weights` and has no place in this run."""
    if weights is None or config.latent_projection or config.traits.thoughts != "continuous":
        return []
    if not (stored_settings(weights) or {}).get("latent_projection"):
        return []
    return [
        f"{weights} was trained with a projection of thoughts, which this run leaves out: latent_projection is null"
    ]


def set_if_any(config: RunConfig, split: Split) -> DataSet:
    """A set that a run does not need; without records if it cannot be read."""
    source = Source.of(config, split)
    with contextlib.suppress(DataError):
        return read_set(source)
    return DataSet(source.path, [])


def _scratch(model: ScratchModelConfig | None, records: list[dict[str, Any]]) -> Backbone:
    assert model is not None, "load_run_config demands a model section for model_id: scratch"
    shape = model.model_dump()
    texts = (text for record in records for text in (record["question"], *record["steps"], record["answer"]))
    tokenizer = word_tokenizer(texts, shape["n_positions"])
    return scratch_backbone(shape.pop("architecture"), tokenizer, **shape)


def tokenized(
    data: DataSet,
    backbone: Backbone,
    curriculum: Curriculum,
    new_tokens: int,
    prompt_format: PromptFormat = "plain",
    stage: int | None = None,
) -> Dataset:
    """The examples of a set; raises InputError for reserved text, and for length as `check_lengths` does."""
    examples = tokenize(data.records, backbone.tokenizer, prompt_format)
    demand_plain_text(data.name, examples, backbone.tokenizer, prompt_format)
    check_lengths(data.name, examples, curriculum, backbone.n_positions, new_tokens, stage)
    return examples


def build_coconut(
    config: RunConfig,
    backbone: Backbone,
    weights: str | None = None,
    checkpointing: ActivationCheckpointingConfig | None = None,
    is_trained: bool = False,
) -> tuple[Coconut, Tokens]:
    """Coconut around `backbone`, with the learned window stored in `weights`, if any, and the run's token ids.

    With what only training needs if it `is_trained`.
    """
    tokens = _tokens(config, backbone)
    model = Coconut(
        backbone.model,
        latent_token_id=tokens.thought,
        start_latent_id=tokens.start_latent,
        end_latent_id=tokens.end_latent,
        eos_token_id=backbone.tokenizer.eos_token_id,
        latent_context=latent_context(config),
        solver=solver(config),
    )
    if is_trained and config.has_copied_decoder:
        model.step_decoder = copy_of(backbone.model)
        if weights is not None and weights != config.load_model_path:  # a checkpoint of this run
            load_decoder(model.step_decoder, Path(weights))
    if is_trained and config.distillation:
        model.distillation = Distillation(config.distillation.layers, config.distillation.deviation)
        model.distillation.check(backbone.model.config.get_text_config(decoder=True).num_hidden_layers)
    if config.fast == "auto":
        fast.install(model)
    if weights is not None:
        load_window(model.latent_window, weights)
    if checkpointing is not None and checkpointing.enabled:
        try:
            model.enable_activation_checkpointing(checkpointing.every_n_layers, checkpointing.offload)
        except ValueError as error:
            raise InputError(str(error)) from None
    return model, tokens


def _tokens(config: RunConfig, backbone: Backbone) -> Tokens:
    tokens = Tokens.of(config.method, backbone.tokenizer)
    if config.step_weight:
        tokens = replace(tokens, step_end=backbone.tokenizer.eos_token_id)
    if config.distillation:
        lead = tuple(backbone.tokenizer(answer_line(""), add_special_tokens=False)["input_ids"])
        tokens = replace(tokens, answer_lead=lead, omits_last_step=config.distillation.omit_last_step)
    reads_steps = bool(config.distillation or config.mixture.verbal)
    tokens = replace(tokens, reads_steps=reads_steps, answers_alone=config.mixture.direct > 0)
    if config.shuffle_facts is None:
        return tokens
    ids = backbone.tokenizer(config.shuffle_facts, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"shuffle_facts: {config.shuffle_facts!r} is {len(ids)} tokens; name the one token that ends every fact, "
            "such as '|' in symbolic ProsQA"
        )
    return replace(tokens, fact_end=int(ids[0]))


def _demand_facts(config: RunConfig, tokens: Tokens, train_set: Dataset) -> None:
    questions = train_set.select_columns("question_ids")
    if tokens.fact_end is not None and not any(tokens.fact_end in row["question_ids"] for row in questions):
        raise InputError(
            f"shuffle_facts: no training question has the token {config.shuffle_facts!r}; name the one that ends every "
            "fact as it stands there (with GPT-2's tokenizer the space before it belongs to it: ' |')"
        )
