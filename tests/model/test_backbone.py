"""Backbones and tokenizers: from scratch, from folders, marker tokens, and models that cannot be had."""

from __future__ import annotations

import time

import prosqa
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from coconut_ds.data.markers import MARKERS
from coconut_ds.errors import ModelError
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.loading import load_backbone
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "dropout": 0.0}


def texts_of(records):
    return [text for record in records for text in (record["question"], *record["steps"], record["answer"])]


@pytest.fixture
def records():
    return [*prosqa.generate(20, "w"), *prosqa.generate(20, "w", n_nodes=6, min_steps=2, max_steps=2, form="symbolic")]


def test_the_word_tokenizer_gives_texts_back(records):
    tokenizer = word_tokenizer(texts_of(records), n_positions=64)
    for record in records:
        chain = "\n".join(record["steps"]) + "\n### " + record["answer"]
        parts = [*(step + "\n" for step in record["steps"]), "### " + record["answer"]]
        ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
        assert tokenizer.decode(ids) == chain
        assert tokenizer.unk_token_id not in ids


def test_a_word_is_one_token_wherever_it_stands(records):
    tokenizer = word_tokenizer(texts_of(records), n_positions=64)
    assert tokenizer.tokenize("n1 n2 n1") == ["▁n1", "▁n2", "▁n1"]
    assert tokenizer.tokenize("### n1") == ["▁###", "▁n1"]
    assert tokenizer.tokenize("Tom is a terpus.\n") == ["▁Tom", "▁is", "▁a", "▁terpus", ".", "\n"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scratch_models_save_and_load(tmp_path, records, architecture):
    made = scratch_backbone(architecture, word_tokenizer(texts_of(records), 64), **SHAPE)
    add_markers(made)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert loaded.n_positions == 64
    assert loaded.marker_ids() == made.marker_ids()
    assert loaded.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    ids = torch.arange(10)[None]
    assert torch.equal(loaded.model(ids).logits, made.model.eval()(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_marker_rows_start_from_the_published_token_or_from_the_mean(records, tied):
    for extra, starts_from in (([], None), (["<<"], "▁<<")):
        tokenizer = word_tokenizer([*texts_of(records), *extra], 64)
        model = tiny.backbone("gpt2").__class__(
            tiny.backbone("gpt2").config.__class__(
                vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=tied
            )
        )
        if starts_from:
            # The published vocabulary has it without a space; ours marks the space before a word.
            tokenizer.add_tokens(["<<"])
            model.resize_token_embeddings(len(tokenizer))
        before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
        backbone = Backbone(model, tokenizer)
        add_markers(backbone)
        ids = [backbone.marker_ids()[marker] for marker in MARKERS]
        assert ids == sorted(ids), "added in the published order"
        after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for old, new in zip(before, after):
            row = old[tokenizer.get_vocab()["<<"]] if starts_from else old.mean(dim=0)
            for marker in ids:
                torch.testing.assert_close(new[marker], row)
            assert torch.equal(new[: len(old)], old)
        n_rows = len(after[0])
        add_markers(backbone)
        assert len(model.get_input_embeddings().weight) == n_rows


def test_the_gpt2_vocabulary_has_the_token_markers_start_from(shared):
    from transformers import AutoTokenizer

    assert "<<" in AutoTokenizer.from_pretrained(shared / "datasets" / "gpt2_tokenizer").get_vocab()


def test_a_model_that_cannot_be_had_is_one_clear_line_and_no_wait():
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_backbone("openai-community/no-such-model")
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert "\n" not in message
    assert "'openai-community/no-such-model'" in message
    assert "set model_id to its folder" in message


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(ModelError, match="is not a model for transformers"):
        load_backbone(str(tmp_path))


def test_logits_changed_after_the_head_are_refused(tmp_path, records):
    made = scratch_backbone("gpt2", word_tokenizer(texts_of(records), 64), **SHAPE)
    made.model.config.logit_scale = 0.5
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"changes its logits after the LM head \(logit_scale\)"):
        load_backbone(str(tmp_path))


def test_the_export_is_plain_transformers(tmp_path, records):
    made = scratch_backbone("llama", word_tokenizer(texts_of(records), 64), **SHAPE)
    made.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in made.model.parameters())
