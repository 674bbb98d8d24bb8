"""An evaluation alone: the precision in which a loaded model runs."""

from __future__ import annotations

import json

import launching
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coconut_ds import train
from coconut_ds.inference.evaluator import Evaluator
from coconut_ds.model.backbone import Backbone, add_markers, cast_parameters
from coconut_ds.model.scratch import word_tokenizer


def llama(vocabulary: int) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    # Large weights make sharp attention, in which an error of a position shows.
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, **shape)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_rotary_embeddings_keep_their_precision(dtype):
    ids = torch.arange(400)[None] % 64
    expected = llama(64)(ids).logits[:, 200:]
    parameters_only, everything = llama(64), llama(64).to(dtype)
    cast_parameters(parameters_only, dtype)
    assert {each.dtype for each in parameters_only.parameters()} == {dtype}
    assert {each.dtype for each in parameters_only.buffers()} == {torch.float32}
    errors = [(each(ids).logits[:, 200:].float() - expected).square().mean() for each in (parameters_only, everything)]
    assert errors[0] < 0.7 * errors[1]


def test_an_evaluation_casts_a_model_as_a_run_does(tmp_path, monkeypatch, capsys):
    run = tiny.run(tmp_path)
    records = json.loads((tmp_path / "prosqa_train.json").read_text())
    tokenizer = word_tokenizer([text for each in records for text in (each["question"], each["answer"])], 64)
    backbone = Backbone(llama(len(tokenizer)), tokenizer)
    add_markers(backbone)
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(tmp_path / "trained")
    seen = {}

    def note(self, stage):
        seen["parameters"], seen["buffers"] = (
            {each.dtype for each in values} for values in (self.model.parameters(), self.model.buffers())
        )

    monkeypatch.setattr(Evaluator, "run", note)
    run |= {"save_path": str(tmp_path / "runs"), "only_eval": True, "load_model_path": str(tmp_path / "trained")}
    run |= {"deepspeed": str(launching.ROOT / "ds_configs" / "zero2.json"), "precision": "bf16", "eval_batch_size": 2}
    assert train.main(["--run", str(launching.write_run(run, tmp_path))]) == 0
    assert seen == {"parameters": {torch.bfloat16}, "buffers": {torch.float32}}
    assert train.main(["--run", str(launching.write_run(run | {"latent_projection": 8}, tmp_path))]) == 2
    assert "trained has no projection of thoughts to evaluate; set latent_projection to null" in capsys.readouterr().err
