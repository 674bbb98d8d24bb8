"""LoRA: against the naive passes, peft's own model and full fine-tuning; merged, stored and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import naive
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from coconut_ds import Coconut, LatentContext
from coconut_ds.errors import InputError, ModelError
from coconut_ds.model import fast
from coconut_ds.model.adapters import (
    Lora,
    adapt,
    difference,
    fingerprint,
    is_adapted,
    load_adapter,
    merge,
    stored_lora,
    write_adapter,
)
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.loading import load_model
from coconut_ds.model.scratch import word_tokenizer

SHAPES = [(9, 2, 2), (4, 1, 1), (12, 3, 3)]
FAMILIES = ("gpt2", "llama", "qwen3")
ROWS = (tiny.START, tiny.END, tiny.LATENT)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def ordinary(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., [token for token in range(tiny.VOCABULARY) if token not in ROWS]]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_rows_alone_are_trained_and_change_nothing_at_first(family):
    torch.manual_seed(0)
    model = tiny.backbone(family).eval()
    ids = torch.randint(0, tiny.VOCABULARY, (2, 9))
    before = model(ids).logits
    adapt(model, tiny.LORA)
    assert torch.equal(model(ids).logits, before)
    kinds = {name.split(".")[-3] if "lora" in name else name.split(".")[-1] for name in trained(model)}
    assert kinds == {"lora_A", "lora_B", "rows"}
    layers = {name.rsplit(".lora", 1)[0] for name in trained(model) if "lora" in name}
    per_layer = 4 if family == "gpt2" else 7
    assert len(layers) == 2 * per_layer
    assert not any("lm_head" in name for name in layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [None, LatentContext((0.6, 0.3, 0.1), norm="embedding")], ids=["plain", "window"])
def test_loss_and_gradients_equal_the_naive_twin_fast_and_recomputed(family, context):
    model = tiny.coconut(family, context, plain=True, lora=tiny.LORA)
    batch = tiny.batch_of(SHAPES)
    inputs = batch.inputs
    total = naive.batch_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    expected = total / batch.n_targets
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in trained(model).items()}
    assert all(each.abs().max() > 1e-4 for each in gradients.values())
    for speed in ("plain", "fast", "recomputed"):
        if speed == "fast":
            fast.install(model)
        if speed == "recomputed":
            model.enable_activation_checkpointing()
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, each in trained(model).items():
            assert torch.allclose(each.grad, gradients[name], rtol=1e-4, atol=1e-5), (speed, name)
        assert all(each.grad is None for each in model.parameters() if not each.requires_grad)


def test_with_a_as_identity_it_is_full_fine_tuning():
    """alpha = r = the inputs of a layer and A = 1: a step of SGD on B is that on the weight."""
    torch.manual_seed(0)
    full, adapted = tiny.coconut("llama", plain=True), tiny.coconut("llama", plain=True)
    targets = ("q_proj", "v_proj", "gate_proj")  # of 32 inputs each
    adapt(adapted.base_causallm, Lora(32, 32, targets=targets, tokens=ROWS))
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            torch.nn.init.eye_(parameter.requires_grad_(False))
    full.requires_grad_(False)
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in targets)
    table = full.base_causallm.get_input_embeddings().weight.requires_grad_(True)
    optimizers = [torch.optim.SGD(trained(model).values(), lr=0.05) for model in (full, adapted)]
    inputs, losses = tiny.batch_of(SHAPES).inputs, []
    for _ in range(6):
        pair = [model(**inputs).loss for model in (full, adapted)]
        for loss, optimizer in zip(pair, optimizers):
            optimizer.zero_grad()
            loss.backward()
            others = torch.ones(len(table), dtype=torch.bool)
            others[list(ROWS)] = False
            if loss is pair[0]:
                table.grad[others] = 0
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    assert losses[0][0] - losses[-1][0] > 0.1
    for one, other in losses:
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_a_plain_model_that_says_the_same(family):
    model = tiny.coconut(family, LatentContext((0.6, 0.3, 0.1)), plain=True, lora=tiny.LORA).eval()
    base, inputs = model.base_causallm, tiny.batch_of(SHAPES).inputs
    inputs.pop("labels")
    names = {name for name, _ in tiny.backbone(family).named_parameters()}
    with torch.no_grad():
        before = model(**inputs).logits
        rows = base.get_input_embeddings().rows.clone()
        merge(base)
        after = model(**inputs).logits
    assert torch.allclose(before, after, atol=1e-4)
    assert {name for name, _ in base.named_parameters()} == names
    assert not is_adapted(base)
    assert torch.equal(base.get_input_embeddings().weight[list(ROWS)], rows)


def stored(model: PreTrainedModel, folder: Path) -> Path:
    write_adapter(folder, model, {name: each.detach() for name, each in trained(model).items()})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read_by_peft_itself(family, tmp_path):
    model = tiny.coconut(family, plain=True, lora=tiny.LORA).base_causallm.eval()
    stored(model, tmp_path)
    torch.manual_seed(0)
    theirs = PeftModel.from_pretrained(tiny.backbone(family), tmp_path).eval()
    ids = torch.randint(0, tiny.VOCABULARY, (2, 9))
    with torch.no_grad():
        # peft trains the rows of a tied head alone, of another head the logits of the markers are its own.
        assert torch.allclose(ordinary(theirs(input_ids=ids).logits), ordinary(model(ids).logits), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_adapter_comes_back_bit_for_bit(family, tmp_path):
    model = tiny.coconut(family, plain=True, lora=tiny.LORA).base_causallm
    stored(model, tmp_path)
    torch.manual_seed(0)
    other = tiny.backbone(family)
    lora = stored_lora(tmp_path)
    assert (lora.r, lora.alpha, lora.tokens) == (4, 8, ROWS)
    adapt(other, lora)
    load_adapter(other, tmp_path)
    own = trained(other)
    assert own.keys() == trained(model).keys()
    assert all(torch.equal(own[name], each) for name, each in trained(model).items())


def test_another_rank_or_other_targets_do_not_fit(tmp_path):
    stored(tiny.coconut("llama", plain=True, lora=tiny.LORA).base_causallm, tmp_path)
    for lora, message in (
        (Lora(2, 8, tokens=ROWS), r"is \[4, 32\], not \[2, 32\]"),
        (Lora(4, 8, targets=("q_proj",), tokens=ROWS), r"does not fit the model: .* names\)"),
    ):
        other = tiny.backbone("llama")
        adapt(other, lora)
        with pytest.raises(ModelError, match=message):
            load_adapter(other, tmp_path)


def test_targets_that_name_nothing_are_refused():
    with pytest.raises(InputError, match=r"lora\.targets: "):
        adapt(tiny.backbone("llama"), Lora(4, 8, targets=("c_attn",)))


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_the_head_and_the_embedding_are_no_targets(target):
    with pytest.raises(InputError, match=rf"lora\.targets: .*{target} is .*; name linear layers"):
        adapt(tiny.backbone("gpt2"), Lora(4, 8, targets=(target, "c_fc")))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_told_from_others(family):
    layer = "c_proj" if family == "gpt2" else "o_proj"
    for targets in (None, (layer,)):
        model, lora = tiny.backbone(family), Lora(4, 8, 0.1, targets, ROWS)
        adapt(model, lora)
        assert difference(model, lora) is None
        assert difference(model, replace(lora, alpha=9)) == "lora.alpha: 9 here, 8 there"
        assert difference(model, replace(lora, tokens=())) == "lora.trainable_tokens: False here, True there"
        other = (layer,) if targets is None else None
        said = difference(model, replace(lora, targets=other))
        assert said.startswith("lora.targets: ")
        assert said.endswith("has adapter there" if targets is None else "has no adapter there")


def test_saved_without_a_tokenizer_and_over_another_kind_of_model(tmp_path):
    backbone = Backbone(tiny.backbone("gpt2"), word_tokenizer(["a b"], 96))
    add_markers(backbone)
    for name in ("base", "other"):
        backbone.model.save_pretrained(tmp_path / name)
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    tokens = tuple(backbone.marker_ids().values())
    adapted = Backbone(load_model(str(tmp_path / "base")), backbone.tokenizer)
    adapt(adapted.model, Lora(4, 8, tokens=tokens, base=str(tmp_path / "base"), base_print=fingerprint(adapted.model)))
    ids = {"start_latent_id": tokens[0], "end_latent_id": tokens[1], "latent_token_id": tokens[2], "eos_token_id": 1}
    models = [Coconut(each, **ids).eval() for each in (adapted.model, load_model(str(tmp_path / "other")))]
    with torch.no_grad():
        for each in trained(models[0]).values():
            each.add_(0.1)
        prompt = torch.tensor([[7, 8, tokens[0], tokens[2], tokens[1]]])
        for model in (*models, *reversed(models)):
            model.save_pretrained(tmp_path / "saved")
            assert torch.equal(Coconut.from_pretrained(tmp_path / "saved")(prompt).logits, model(prompt).logits)


def test_a_damaged_adapter_is_named(tmp_path):
    stored(tiny.coconut("llama", plain=True, lora=tiny.LORA).base_causallm, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(InputError, match="adapters cannot be read: 'target_modules'; copy the folder again"):
        stored_lora(tmp_path)


def test_other_weights_have_another_fingerprint():
    torch.manual_seed(0)
    model = tiny.backbone("llama")
    before = fingerprint(model)
    assert fingerprint(model) == before
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert fingerprint(model) != before


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_adapters_equals_the_naive_twin(family):
    model = tiny.coconut(family, LatentContext((0.6, 0.4)), lora=tiny.LORA).eval()
    prompt = [7, 8, 9, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END]
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=5)[0].tolist()
    expected = naive.greedy(model, prompt, 5)
    assert tokens[: len(expected)] == expected
