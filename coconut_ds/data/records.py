"""Records -> tokenized examples in an Arrow table, and their lengths. Tokenized once; stages are made on the fly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from coconut_ds import strict_json
from coconut_ds.data.answers import answer_line, step_line
from coconut_ds.data.files import KEYS, DataError
from coconut_ds.data.prompts import PromptFormat, question_ids
from coconut_ds.data.stages import Curriculum

_TOKENIZATION = 1
"""Cache version, incremented when `_tokenize_batch` changes, so that older tables are not read."""


def tokenize(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat = "plain"
) -> Dataset:
    """Tokenize each part apart: the question as `prompts.py` says, each step + newline, "### " + answer, EOS.

    Columns: question_ids (list of ids), steps_ids (list of lists), answer_ids, and the texts question, steps, answer.
    The table is cached on disk beside those of `datasets` (`HF_DATASETS_CACHE`), under a hash of texts and tokenizer.
    """
    texts = Dataset.from_list([{key: record[key] for key in KEYS} for record in records])
    name = _content_hash(records, tokenizer, prompt_format)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "coconut_ds"
    folder.mkdir(parents=True, exist_ok=True)
    return texts.map(
        _tokenize_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "prompt_format": prompt_format},
        cache_file_name=str(folder / f"{name}.arrow"),
        new_fingerprint=name,
    )


def _content_hash(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> str:
    texts = [[record[key] for key in KEYS] for record in records]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else f"{tokenizer!r} {sorted(tokenizer.get_vocab().items())}"
    parts = [_TOKENIZATION, type(tokenizer).__name__, rules, tokenizer.special_tokens_map, texts]
    if prompt_format == "chat":
        parts.append(tokenizer.chat_template)
    content = strict_json.dumps(parts)
    return hashlib.sha256(content.encode()).hexdigest()


def _tokenize_batch(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat = "plain"
) -> dict[str, list]:
    def ids(texts: Iterable[str]) -> list[list[int]]:
        texts = list(texts)
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    flat_steps = iter(ids(step_line(step) for steps in batch["steps"] for step in steps))
    return {
        "question_ids": question_ids(batch["question"], tokenizer, prompt_format),
        "steps_ids": [[next(flat_steps) for _ in steps] for steps in batch["steps"]],
        "answer_ids": [[*each, tokenizer.eos_token_id] for each in ids(map(answer_line, batch["answer"]))],
    }


def row_of(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """The ids of one record, as `tokenize` makes them."""
    batch = _tokenize_batch({key: [record[key]] for key in KEYS}, tokenizer)
    return {name: column[0] for name, column in batch.items()}


def target_ids(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of all steps and the answer of one record, EOS included."""
    row = row_of(record, tokenizer)
    return [*(token for step in row["steps_ids"] for token in step), *row["answer_ids"]]


def longest_prompt(examples: Dataset, curriculum: Curriculum) -> int:
    """Columns of the longest evaluation prompt of any stage."""
    stages = range(curriculum.max_latent_stage + 2)
    lengths = []
    for row in examples.select_columns(["question_ids", "steps_ids"]):
        steps = [len(step) for step in row["steps_ids"]]
        layouts = {curriculum.prompt_layout(stage, len(steps)) for stage in stages}
        lengths.append(len(row["question_ids"]) + max(each.n_thoughts + sum(each.before(steps)) for each in layouts))
    return curriculum.n_markers + max(lengths)


def check_lengths(
    path: str | Path,
    examples: Dataset,
    curriculum: Curriculum,
    n_positions: int,
    new_tokens: int,
    stage: int | None = None,
) -> None:
    """Raise DataError for the first example that does not fit the model's positions, in training or when decoding.

    The training bound is the longest layout of any stage, or of `stage` alone; the decoding bound the longest prompt
    plus `new_tokens`.
    """
    shorter = "max_new_tokens" if curriculum.eval_thoughts is None else "max_new_tokens or eval_thoughts"
    for index, row in enumerate(examples.select_columns(["question_ids", "steps_ids", "answer_ids"])):
        steps = [len(step) for step in row["steps_ids"]]
        prompt = len(row["question_ids"]) + curriculum.n_markers
        layouts = curriculum.layouts(len(steps)) if stage is None else {curriculum.layout(stage, len(steps))}
        middle = max(each.n_thoughts + sum(steps) - sum(each.replaced(steps)) for each in layouts)
        training = prompt + middle + len(row["answer_ids"])
        if training > n_positions:
            raise DataError(
                f"{path}: record {index}: key 'question' and 'steps': {training} tokens with thoughts and answer, "
                f"the model has {n_positions} positions; leave the record out or use a model with more"
            )
        decoding = prompt + max(each.n_thoughts + sum(each.before(steps)) for each in layouts) + new_tokens
        if decoding > n_positions:
            raise DataError(
                f"{path}: record {index}: key 'question': a prompt of {decoding - new_tokens} tokens and "
                f"max_new_tokens {new_tokens} need {decoding} positions, the model has {n_positions}; lower {shorter}"
            )
