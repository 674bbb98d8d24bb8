"""Evaluation, decoding and inspection of a small model, on fake CUDA and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from analysis.test_inspection import SYMBOLIC, trained_on, words_of

from coconut_ds.analysis.inspection.findings import Inspection
from coconut_ds.data.records import tokenize
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model import fast
from coconut_ds.model.decoding import decode
from coconut_ds.runtime import distributed
from fake_cuda.device import CUDA
from fake_cuda.tensors import FakeCuda, on_cuda
from fake_cuda.training import WINDOWS

RECORDS = [
    SYMBOLIC,
    {**SYMBOLIC, "question": "n2 n0 | n1 n2 | n21 n10 | n1 n12 | ? n1 n0 n10", "steps": ["n1 n2"]},
    {**SYMBOLIC, "question": "n1 n12 | n2 n0 | n1 n2 | n21 n10 | ? n1 n10 n0"},
]


@contextmanager
def trained(family: str, window: str, dtype: str, device: str) -> Iterator[tuple[TrainedModel, FakeCuda]]:
    """A model that takes as many thoughts as a question has steps, and what the host waits for from here on."""
    made = trained_on(words_of(SYMBOLIC), WINDOWS[window], family=family, pad_latent_to_max=False)
    fast.install(made.model)
    place = CUDA if device == "cuda" else torch.device("cpu")
    with FakeCuda() as cuda, mock.patch.object(distributed, "device", return_value=place), torch.no_grad():
        if device == "cuda":
            made = replace(made, model=on_cuda(made.model, getattr(torch, dtype)))
            made.model.latent_window(torch.zeros(1, 1, 1, device=CUDA))
        cuda.waits.clear()
        yield made, cuda


def decoding(family: str, dtype: str, device: str, thoughts: int, new_tokens: int) -> dict[str, Any]:
    """The tokens that follow the prompts, none of which ends early, and what the host waits for."""
    with trained(family, "three", dtype, device) as (made, cuda):
        made.model.eos_token_id = 10_000  # of no token
        inputs = made.prompts([record["question"] for record in RECORDS], [thoughts, 1, thoughts]).inputs
        cuda.waits.clear()
        done = decode(made.model, inputs["input_ids"], inputs["attention_mask"], new_tokens, inputs["thought_span"])
        waits = dict(cuda.waits)
        return {"tokens": done.tokens.tolist(), "waits": waits}


def evaluation(family: str, window: str, dtype: str, device: str) -> dict[str, Any]:
    """The evaluation of a set in two batches, its predictions, and what the host waits for in its loss."""
    with trained(family, window, dtype, device) as (made, cuda):
        examples = tokenize(RECORDS, made.tokenizer)
        evaluator = Evaluator(made.model, examples, made.curriculum, made.tokens, made.tokenizer, 2, 4)
        evaluator.loss(2)
        waits_of_loss = dict(cuda.waits)
        found: Any = evaluator.run(2)
    metrics, predictions = found
    return {"metrics": {**metrics.as_dict(), "examples_per_s": 0}, "predictions": predictions, "waits": waits_of_loss}


def inspection(family: str, window: str, dtype: str, device: str) -> dict[str, Any]:
    """Everything that `inspect_latents --all --intervene` finds."""
    with trained(family, window, dtype, device) as (made, _):
        found = Inspection.of(made, list(enumerate(RECORDS)), new_tokens=4, batch_size=2).of_file(seed=0)
    return found


def check(what: str, **case: Any) -> dict[str, Any]:
    """Any of them, so that one process does for all."""
    return {"decoding": decoding, "evaluation": evaluation, "inspection": inspection}[what](**case)
