"""Weights a run can start from: folders, and `.pt` state dicts under the key names of the published code."""

from __future__ import annotations

import prosqa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut_ds import export
from coconut_ds.config import RunConfig
from coconut_ds.errors import InputError
from coconut_ds.model.backbone import MARKERS, Backbone, add_markers, scratch_backbone, word_tokenizer
from coconut_ds.model.pretrained import stored_settings, write_folder
from coconut_ds.training import sealed_folder
from coconut_ds.training.weights import latent_settings, load_initial

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "dropout": 0.0}


def make(architecture: str, markers: bool, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    records = prosqa.generate(10, "w")
    tokenizer = word_tokenizer((text for r in records for text in (r["question"], *r["steps"], r["answer"])), 64)
    backbone = scratch_backbone(architecture, tokenizer, **SHAPE)
    if markers:
        add_markers(backbone)
    return backbone


def save_plain(backbone: Backbone, folder) -> str:
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


def run(**values) -> RunConfig:
    return RunConfig(coconut=True, train_path="t", val_path="v", **values)


def sealed(path, backbone: Backbone, settings: dict):
    """What a run's checkpoint holds of its model."""
    unfinished = sealed_folder.begin(path)
    write_folder(unfinished / "model", backbone.model, backbone.tokenizer, settings)
    return sealed_folder.publish(unfinished)


def equal(one: Backbone, other: Backbone) -> bool:
    own, theirs = one.model.state_dict(), other.model.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "prefix", ["base_causallm.", "", "module.base_causallm.", "_fsdp_wrapped_module.base_causallm."], ids=repr
)
def test_a_published_coconut_state_dict(tmp_path, architecture, prefix):
    trained = make(architecture, markers=True, seed=1)
    state = {prefix + key: value for key, value in trained.model.state_dict().items()}
    # The published class keeps the embedding table under a second name.
    state[prefix.removesuffix("base_causallm.") + "embedding.weight"] = trained.model.get_input_embeddings().weight.data
    torch.save(state, tmp_path / "checkpoint_3")
    folder = save_plain(make(architecture, markers=False), tmp_path / "base")
    loaded = load_initial(run(model_id=folder, load_model_path=str(tmp_path / "checkpoint_3")))
    assert equal(loaded, trained)
    assert loaded.marker_ids() == trained.marker_ids()


def test_a_chain_of_thought_state_dict_without_markers_starts_coconut(tmp_path):
    trained = make("gpt2", markers=False, seed=1)
    torch.save(trained.model.state_dict(), tmp_path / "cot.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    loaded = load_initial(run(model_id=folder, load_model_path=str(tmp_path / "cot.pt")))
    n_before = len(trained.tokenizer)
    new = loaded.model.get_input_embeddings().weight
    assert torch.equal(new[:n_before], trained.model.get_input_embeddings().weight)
    for marker in MARKERS:
        torch.testing.assert_close(new[loaded.marker_ids()[marker]], new[:n_before].mean(dim=0))
    plain = run(model_id=folder, load_model_path=str(tmp_path / "cot.pt"))
    plain = plain.model_copy(update={"method": "cot"})
    assert equal(load_initial(plain), trained)


def test_state_dicts_that_do_not_fit_are_refused(tmp_path):
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    torch.save(make("llama", markers=False).model.state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="does not fit gpt2: missing"):
        load_initial(run(model_id=folder, load_model_path=str(tmp_path / "other.pt")))
    wider = scratch_backbone("gpt2", make("gpt2", markers=False).tokenizer, **(SHAPE | {"n_embd": 64}))
    torch.save(wider.model.state_dict(), tmp_path / "wider.pt")
    with pytest.raises(InputError, match=r"of another shape \['transformer.wte.weight'"):
        load_initial(run(model_id=folder, load_model_path=str(tmp_path / "wider.pt")))
    (tmp_path / "text.pt").write_text("no tensors here")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("text", "list", "numbers"):
        with pytest.raises(InputError, match="is not a state dict of tensors"):
            load_initial(run(model_id=folder, load_model_path=str(tmp_path / f"{name}.pt")))


def test_a_state_dict_of_a_model_whose_embedding_had_spare_rows(tmp_path):
    """The published code cuts the embedding to the tokenizer's length when it adds its markers."""
    base = make("llama", markers=False)
    base.model.resize_token_embeddings(len(base.tokenizer) + 10, mean_resizing=False)
    trained = make("llama", markers=True, seed=1)
    torch.save(trained.model.state_dict(), tmp_path / "cut.pt")
    folder = save_plain(base, tmp_path / "base")
    assert equal(load_initial(run(model_id=folder, load_model_path=str(tmp_path / "cut.pt"))), trained)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'was_here')!r}, 'w')\nfrom transformers import GPT2Config as Config\n"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(code)
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(InputError, match="is not a model for transformers"):
        load_initial(run(model_id=str(folder)))
    assert not (tmp_path / "was_here").exists()


def test_a_damaged_checkpoint_is_not_started_from(tmp_path):
    path = sealed(tmp_path / "epoch_0001", make("llama", markers=True), {"method": "coconut"})
    weights = path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for named in (path, path / "model"):
        with pytest.raises(InputError, match=r"model/model.safetensors is not what was written"):
            load_initial(run(load_model_path=str(named)))
    (path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest.json is missing"):
        load_initial(run(load_model_path=str(path)))
    weights.write_bytes(content[:1000])
    with pytest.raises(InputError, match="is not a model for transformers"):
        load_initial(run(load_model_path=str(path / "model")))


def test_code_in_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    with pytest.raises(InputError, match="is not a state dict of tensors"):
        load_initial(run(model_id=folder, load_model_path=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "was_here").exists()


def test_an_exported_folder_and_the_checkpoint_around_it(tmp_path):
    trained = make("llama", markers=True, seed=1)
    settings = {"method": "coconut", "stage": 3, "latent_norm": "rms"}
    sealed(tmp_path / "epoch_0001", trained, settings)
    for path in (tmp_path / "epoch_0001", tmp_path / "epoch_0001" / "model"):
        assert equal(load_initial(run(load_model_path=str(path))), trained)
        assert stored_settings(str(path)) == settings
    assert stored_settings(save_plain(trained, tmp_path / "plain")) is None


def test_settings_of_an_early_checkpoint_are_filled_in(tmp_path):
    window = {"weights": [0.6, 0.3, 0.1], "scope": "sequence"}
    early = {"method": "coconut", "c_thought": 1, "pad_latent_to_max": True, "max_latent_stage": 2, "stage": 1}
    for context in (window, None):
        config = run(max_latent_stage=2, pad_latent_to_max=True, latent_context=context)
        path = sealed(tmp_path / str(context), make("llama", markers=True), early | {"latent_context": context})
        found = stored_settings(str(path))
        assert {key: found[key] for key in latent_settings(config)} == latent_settings(config)


def test_scratch_and_a_state_dict_without_a_folder(tmp_path):
    torch.save(make("gpt2", markers=False).model.state_dict(), tmp_path / "some.pt")
    with pytest.raises(InputError, match="a state dict has no shape"):
        load_initial(run(model_id="scratch", load_model_path=str(tmp_path / "some.pt")))


def test_the_word_level_vocabulary_is_the_same_every_time():
    assert make("gpt2", True).tokenizer.get_vocab() == make("gpt2", True).tokenizer.get_vocab()


def test_export_makes_a_folder_of_a_published_state_dict(tmp_path, capsys):
    trained = make("gpt2", markers=True, seed=1)
    state = {f"module.base_causallm.{key}": value for key, value in trained.model.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint_7")
    base = save_plain(make("gpt2", markers=False), tmp_path / "base")
    command = [str(tmp_path / "checkpoint_7"), str(tmp_path / "out"), "--model-id", base]
    assert export.main(command) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert equal(Backbone(loaded, tokenizer), trained)
    assert set(MARKERS) <= set(tokenizer.get_vocab())
    assert not (tmp_path / "out" / "coconut.json").exists()
    assert export.main(command) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err


def test_export_of_our_checkpoint_looks_at_its_manifest_first(tmp_path, capsys):
    trained = make("llama", markers=True, seed=1)
    settings = {"method": "coconut", "stage": 2, "latent_norm": "none"}
    path = sealed(tmp_path / "epoch_0001", trained, settings)
    assert export.main([str(path), str(tmp_path / "out")]) == 0
    assert equal(load_initial(run(load_model_path=str(tmp_path / "out"))), trained)
    assert stored_settings(str(tmp_path / "out")) == settings
    (path / "model" / "config.json").write_text("{}")
    assert export.main([str(path), str(tmp_path / "other")]) == 2
    assert "model/config.json has 2 bytes" in capsys.readouterr().err
