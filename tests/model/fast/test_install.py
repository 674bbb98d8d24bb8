"""The speed layer comes off without a trace, and a model without it is as transformers made it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_coconut import CONTEXTS, RAGGED
from transformers import AutoModelForCausalLM

from coconut_ds import Coconut
from coconut_ds.errors import ModelError
from coconut_ds.model import fast

FAMILIES = ("gpt2", "llama")
IDS = {
    "latent_token_id": tiny.LATENT,
    "start_latent_id": tiny.START,
    "end_latent_id": tiny.END,
    "eos_token_id": tiny.EOS,
}


def parts(base) -> dict[str, tuple]:
    """By name: the module itself, its class, and all that could stand in the way of its own methods."""
    found: dict[str, tuple] = {"attention": (base.config._attn_implementation,)}
    for name, module in base.named_modules():
        in_the_way = sorted(set(vars(module)) & {"forward", "update", "__call__"})
        found[name] = (id(module), type(module), dict(module._forward_hooks), in_the_way)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_a_model_leaves_it_as_it_was(family):
    base = tiny.backbone(family)
    before = parts(base)
    model = Coconut(base, **IDS, latent_context=CONTEXTS["sequence"])
    assert parts(base) == before
    model.base_causallm.base_model.register_forward_hook(lambda *_: during.append(parts(base)))
    during: list[dict] = []
    before = parts(base)
    model(**tiny.batch_of(RAGGED).inputs).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.generate(torch.tensor([[5, 6, tiny.LATENT, tiny.END]]), max_new_tokens=2)
    assert during
    assert all(each == before for each in (*during, parts(base)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_uninstall_leaves_nothing(family, checkpointed):
    model = tiny.coconut(family, CONTEXTS["sequence"], plain=True)
    before = parts(model.base_causallm)
    expected = model(**tiny.batch_of(RAGGED).inputs).loss
    fast.install(model)
    if checkpointed:
        model.enable_activation_checkpointing()
    assert parts(model.base_causallm) != before
    torch.testing.assert_close(model(**tiny.batch_of(RAGGED).inputs).loss, expected)
    fast.uninstall(model)
    assert parts(model.base_causallm) == before
    assert model.speed_layer is None
    assert torch.equal(model(**tiny.batch_of(RAGGED).inputs).loss, expected)
    fast.uninstall(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_has_no_trace(family, tmp_path):
    for name, plain in (("plain", True), ("fast", False)):
        tiny.coconut(family, plain=plain).save_pretrained(tmp_path / name)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {path.name for path in (tmp_path / "fast").iterdir()}
    for name in names - {"README.md"}:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert "gathering" not in json.dumps(json.loads((tmp_path / "fast" / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert loaded.config._attn_implementation == "sdpa"


def test_a_second_install_does_nothing():
    model = tiny.coconut("gpt2")
    layer, before = model.speed_layer, parts(model.base_causallm)
    fast.install(model)
    assert model.speed_layer is layer
    assert parts(model.base_causallm) == before


def test_recomputing_needs_the_layer():
    with pytest.raises(ValueError, match=r"call coconut_ds.model.fast.install\(model\) first"):
        tiny.coconut("gpt2", plain=True).enable_activation_checkpointing()


def test_a_layer_that_does_not_fit_is_taken_off_again(monkeypatch):
    model = tiny.coconut("llama", CONTEXTS["sequence"], plain=True)
    before = parts(model.base_causallm)
    monkeypatch.setattr(fast.low_rank_linear, "product", lambda rows, matrix, bias=None: rows @ matrix * 1.5)
    with pytest.raises(ModelError, match="logits differ from those of a plain forward"):
        fast.install(model)
    assert parts(model.base_causallm) == before
    assert model.speed_layer is None


@pytest.mark.parametrize("name", ["_can_compile_fullgraph", "_is_stateful", "_attn_implementation"])
def test_transformers_without_a_private_name_is_refused(monkeypatch, name):
    base = tiny.backbone("llama")
    for owner in (*type(base).__mro__, *type(base.config).__mro__):
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(ModelError, match=rf"transformers \S+ has no {name}, .*install transformers==5"):
        Coconut(base, **IDS)


def test_torch_without_a_private_name_is_refused(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(ModelError, match=r"torch \S+ has no _current_graph_task_id, .*install torch==2"):
        Coconut(tiny.backbone("llama"), **IDS)
