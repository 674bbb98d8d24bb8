"""Weights a run can start from: folders, and `.pt` state dicts under the key names of the published code."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import prosqa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut_ds import Coconut
from coconut_ds.checkpoints.weights import latent_settings, load_initial
from coconut_ds.commands import ask, export
from coconut_ds.config.run_config import RunConfig
from coconut_ds.data.markers import MARKERS
from coconut_ds.errors import InputError
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.folder import stored_settings, write_folder
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer
from coconut_ds.runs import atomic_folder
from coconut_ds.training.setup import build_coconut

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "dropout": 0.0}


def initial(config: RunConfig) -> Backbone:
    """What a run of this configuration starts from."""
    return load_initial(config.model_id, config.load_model_path, config.traits.thoughts != "none")


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


def published(path, backbone: Backbone, settings: dict):
    """A checkpoint folder with a model in it, and its manifest."""
    unfinished = atomic_folder.begin(path)
    write_folder(unfinished / "model", backbone.model, backbone.tokenizer, settings)
    return atomic_folder.publish(unfinished)


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
    loaded = initial(run(model_id=folder, load_model_path=str(tmp_path / "checkpoint_3")))
    assert equal(loaded, trained)
    assert loaded.marker_ids() == trained.marker_ids()


def test_a_chain_of_thought_state_dict_without_markers_starts_coconut(tmp_path):
    trained = make("gpt2", markers=False, seed=1)
    torch.save(trained.model.state_dict(), tmp_path / "cot.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    loaded = initial(run(model_id=folder, load_model_path=str(tmp_path / "cot.pt")))
    n_before = len(trained.tokenizer)
    new = loaded.model.get_input_embeddings().weight
    assert torch.equal(new[:n_before], trained.model.get_input_embeddings().weight)
    for marker in MARKERS:
        torch.testing.assert_close(new[loaded.marker_ids()[marker]], new[:n_before].mean(dim=0))
    plain = run(model_id=folder, load_model_path=str(tmp_path / "cot.pt"))
    plain = plain.model_copy(update={"method": "cot"})
    assert equal(initial(plain), trained)


def test_state_dicts_that_do_not_fit_are_refused(tmp_path):
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    torch.save(make("llama", markers=False).model.state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="does not fit gpt2: missing"):
        initial(run(model_id=folder, load_model_path=str(tmp_path / "other.pt")))
    wider = scratch_backbone("gpt2", make("gpt2", markers=False).tokenizer, **(SHAPE | {"n_embd": 64}))
    torch.save(wider.model.state_dict(), tmp_path / "wider.pt")
    with pytest.raises(InputError, match=r"of another shape \['transformer.wte.weight'"):
        initial(run(model_id=folder, load_model_path=str(tmp_path / "wider.pt")))
    (tmp_path / "text.pt").write_text("no tensors here")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("text", "list", "numbers"):
        with pytest.raises(InputError, match="is not a state dict of tensors"):
            initial(run(model_id=folder, load_model_path=str(tmp_path / f"{name}.pt")))


def test_a_state_dict_of_a_model_whose_embedding_had_spare_rows(tmp_path):
    """The published code cuts the embedding to the tokenizer's length when it adds its markers."""
    base = make("llama", markers=False)
    base.model.resize_token_embeddings(len(base.tokenizer) + 10, mean_resizing=False)
    trained = make("llama", markers=True, seed=1)
    torch.save(trained.model.state_dict(), tmp_path / "cut.pt")
    folder = save_plain(base, tmp_path / "base")
    assert equal(initial(run(model_id=folder, load_model_path=str(tmp_path / "cut.pt"))), trained)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'was_here')!r}, 'w')\nfrom transformers import GPT2Config as Config\n"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(code)
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(InputError, match="is not a model for transformers"):
        initial(run(model_id=str(folder)))
    assert not (tmp_path / "was_here").exists()


def test_a_damaged_checkpoint_is_not_started_from(tmp_path):
    path = published(tmp_path / "epoch_0001", make("llama", markers=True), {"method": "coconut"})
    weights = path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for named in (path, path / "model"):
        with pytest.raises(InputError, match=r"model/model.safetensors is not what was written"):
            initial(run(load_model_path=str(named)))
    (path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest.json is missing"):
        initial(run(load_model_path=str(path)))
    weights.write_bytes(content[:1000])
    with pytest.raises(InputError, match="is not a model for transformers"):
        initial(run(load_model_path=str(path / "model")))


def test_code_in_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_here"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    with pytest.raises(InputError, match="is not a state dict of tensors"):
        initial(run(model_id=folder, load_model_path=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "was_here").exists()


def test_an_exported_folder_and_the_checkpoint_around_it(tmp_path):
    trained = make("llama", markers=True, seed=1)
    settings = {"method": "coconut", "stage": 3, "latent_norm": "rms", "latent_projection": None, "solver": None}
    settings |= {"curriculum": "reversed", "prompt_format": "plain"}
    published(tmp_path / "epoch_0001", trained, settings)
    for path in (tmp_path / "epoch_0001", tmp_path / "epoch_0001" / "model"):
        assert equal(initial(run(load_model_path=str(path))), trained)
        assert stored_settings(str(path)) == settings
    assert stored_settings(save_plain(trained, tmp_path / "plain")) is None


def test_settings_of_an_early_checkpoint_are_filled_in(tmp_path):
    window = {"weights": [0.6, 0.3, 0.1], "scope": "sequence"}
    early = {"method": "coconut", "c_thought": 1, "pad_latent_to_max": True, "max_latent_stage": 2, "stage": 1}
    for context in (window, None):
        config = run(max_latent_stage=2, pad_latent_to_max=True, latent_context=context)
        path = published(tmp_path / str(context), make("llama", markers=True), early | {"latent_context": context})
        found = stored_settings(str(path))
        assert {key: found[key] for key in latent_settings(config)} == latent_settings(config)


def test_scratch_and_a_state_dict_without_a_folder(tmp_path):
    torch.save(make("gpt2", markers=False).model.state_dict(), tmp_path / "some.pt")
    with pytest.raises(InputError, match="a state dict has no shape"):
        initial(run(model_id="scratch", load_model_path=str(tmp_path / "some.pt")))


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


def test_export_of_a_checkpoint_verifies_its_manifest_first(tmp_path, capsys):
    trained = make("llama", markers=True, seed=1)
    settings = {"method": "coconut", "stage": 2, "latent_norm": "none", "latent_projection": None, "solver": None}
    settings |= {"curriculum": "forward", "prompt_format": "plain"}
    path = published(tmp_path / "epoch_0001", trained, settings)
    assert export.main([str(path), str(tmp_path / "out")]) == 0
    assert equal(initial(run(load_model_path=str(tmp_path / "out"))), trained)
    assert stored_settings(str(tmp_path / "out")) == settings
    (path / "model" / "config.json").write_text("{}")
    assert export.main([str(path), str(tmp_path / "other")]) == 2
    assert "model/config.json has 2 bytes" in capsys.readouterr().err


def trained_folder(tmp_path) -> str:
    """What `export` writes of a run: no manifest beside it."""
    settings = {
        "method": "coconut",
        "c_thought": 1,
        "max_latent_stage": 1,
        "pad_latent_to_max": True,
        "stage": 1,
        "latent_context": {"weights": [0.5, 0.3, 0.2], "scope": "sequence", "learned": True},
    }
    backbone = make("llama", markers=True)
    window = {"latent_window.logits": torch.zeros(3)}
    write_folder(tmp_path / "model", backbone.model, backbone.tokenizer, settings, window=window)
    return str(tmp_path / "model")


def change_weights(folder: str, change) -> None:
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shard(folder: str) -> list[Path]:
    """Write the weights anew as several files with an index, and name them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (Path(folder) / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return sorted(Path(folder).glob("model-*.safetensors"))


def drop_from_index(folder: str) -> None:
    """As of an upload of which one file, and its place in the index, got lost."""
    shard(folder)
    index = Path(folder) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name != file}
    index.write_text(json.dumps(content))


def drop_from_shard(folder: str) -> None:
    (file,) = [each for each in shard(folder) if "model.norm.weight" in load_file(each)]
    save_file({key: value for key, value in load_file(file).items() if key != "model.norm.weight"}, file)


def change_config(folder: str, **values) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def as_bin(folder: str, change) -> None:
    weights = load_file(Path(folder) / "model.safetensors")
    (Path(folder) / "model.safetensors").unlink()
    torch.save(change(weights), Path(folder) / "pytorch_model.bin")


def without(*keys):
    return lambda weights: {key: value for key, value in weights.items() if key not in keys}


def put(**values):
    return lambda weights: weights | {key.replace("__", "."): value for key, value in values.items()}


DOWN = "model.layers.1.mlp.down_proj.weight"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
DAMAGES = {
    "a missing weight": (
        lambda folder: change_weights(folder, without(DOWN)),
        rf"does not fit llama: missing \['{DOWN}'\]; a missing weight would be random",
    ),
    "no head, which is not tied": (
        lambda folder: change_weights(folder, without("lm_head.weight")),
        r"missing \['lm_head.weight'\]",
    ),
    "a prefix that nobody knows": (
        lambda folder: change_weights(
            folder, lambda weights: {f"student.{key}": each for key, each in weights.items()}
        ),
        r"missing \['lm_head.weight', .* and \d+ more, unexpected \['student.lm_head.weight'",
    ),
    "layers that config.json does not know": (
        lambda folder: change_config(folder, num_hidden_layers=1),
        r"unexpected \['model.layers.1.input_layernorm.weight'",
    ),
    "layers that are not there": (
        lambda folder: change_config(folder, num_hidden_layers=3),
        r"missing \['model.layers.2.input_layernorm.weight'",
    ),
    "another shape": (
        lambda folder: change_weights(folder, put(model__norm__weight=torch.ones(7))),
        r"of another shape \['model.norm.weight'\] \(\[7\], not \[32\]\)",
    ),
    "embeddings shorter than config.json says": (
        lambda folder: change_weights(folder, lambda w: w | {key: w[key][:-1].clone() for key in TABLES}),
        r"of another shape \['lm_head.weight', 'model.embed_tokens.weight'\]",
    ),
    "embeddings shorter than the tokenizer": (
        lambda folder: (
            change_weights(folder, lambda w: w | {key: w[key][:-1].clone() for key in TABLES}),
            change_config(folder, vocab_size=len(load_file(Path(folder) / "model.safetensors")["lm_head.weight"])),
        ),
        r"(the tokenizer's highest id is|latent_token_id) \d+, the embedding has \d+ rows",
    ),
    "not finite": (
        lambda folder: change_weights(folder, put(model__norm__weight=torch.full((32,), torch.nan))),
        r"values that are not finite: \['model.norm.weight'\]",
    ),
    "a shard that is missing": (lambda folder: shard(folder)[1].unlink(), "No such file"),
    "a weight that the index does not name": (drop_from_index, r"missing \[.*'model.norm.weight'\]"),
    "a weight that is not in its shard": (drop_from_shard, r"missing \['model.norm.weight'\]"),
    "an old .bin file without a weight": (
        lambda folder: as_bin(folder, without("model.norm.weight")),
        r"missing \['model.norm.weight'\]",
    ),
    "an old .bin file with its weights one level down": (
        lambda folder: as_bin(folder, lambda weights: {"model": weights, "epoch": 3}),
        r"missing \['lm_head.weight'.*unexpected \['epoch', 'model'\]",
    ),
    "quantized weights": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is not a model for transformers: Loading a GPTQ quantized model requires",
    ),
    "integers under the name of a weight": (
        lambda folder: change_weights(folder, put(model__norm__weight=torch.ones(32, dtype=torch.int8))),
        r"holds quantized weights: \['model.norm.weight \(I8\)'\]; save it in fp32",
    ),
    "8 bits without their scales": (
        lambda folder: change_weights(folder, lambda w: w | {DOWN: w[DOWN].to(torch.float8_e4m3fn)}),
        r"holds quantized weights: \['model.layers.1.mlp.down_proj.weight \(F8_E4M3\)'\]",
    ),
    "a weight twice": (
        lambda folder: change_weights(folder, lambda w: w | {f"base_causallm.{DOWN}": 2 * w[DOWN]}),
        "has weights twice, with and without prefixes",
    ),
    "a window that is not finite": (
        lambda folder: save_file(
            {"latent_window.logits": torch.full((3,), torch.nan)}, Path(folder) / "latent_window.safetensors"
        ),
        r"values that are not finite: \['latent_window.logits'\]",
    ),
    "a configuration that cannot be": (lambda folder: change_config(folder, num_attention_heads=5), "not a multiple"),
    "a tokenizer without markers": (
        lambda folder: make("llama", markers=False).tokenizer.save_pretrained(folder),
        "has no <|start-latent|>, <|end-latent|>, <|latent|>".replace("|", r"\|"),
    ),
    "settings that are not JSON": (
        lambda folder: (Path(folder) / "coconut.json").write_text("{"),
        "coconut.json cannot be used: Expecting property name",
    ),
    "a method of another version": (
        lambda folder: (Path(folder) / "coconut.json").write_text('{"method": "telepathy"}'),
        "method 'telepathy' is not one of coconut, cot",
    ),
    "a window under another name": (
        lambda folder: save_file({"logits": torch.zeros(3)}, Path(folder) / "latent_window.safetensors"),
        r"must hold \['latent_window.logits'\], found \['logits'\]",
    ),
}
LOADERS = {
    "load_model_path": lambda folder, out: build_coconut(
        run(
            max_latent_stage=1,
            pad_latent_to_max=True,
            latent_context={"weights": [0.5, 0.3, 0.2], "learned": True},
        ),
        initial(run(load_model_path=folder)),
        folder,
    ),
    "from_pretrained": lambda folder, out: Coconut.from_pretrained(folder),
    "ask and inspect": lambda folder, out: TrainedModel.load(folder),
    "export": lambda folder, out: export.export(folder, out, "unused"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_folder_is_refused_by_everything_that_loads_one(tmp_path, damage, loader):
    folder = trained_folder(tmp_path)
    LOADERS[loader](folder, tmp_path / "before")
    harm, message = DAMAGES[damage]
    harm(folder)
    is_elsewhere = {
        # Weights alone have no settings; markers that a tokenizer lacks are added.
        "load_model_path": ("settings that are not JSON", "a method of another version", "a tokenizer without markers"),
        "export": ("a tokenizer without markers",),
    }
    if damage in is_elsewhere.get(loader, ()):
        return
    with pytest.raises(InputError, match=message) as caught:
        LOADERS[loader](folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_commands_end_with_status_2_where_weights_are_missing(tmp_path, capsys):
    folder = trained_folder(tmp_path)
    change_weights(folder, without(DOWN))
    assert export.main([folder, str(tmp_path / "out")]) == 2
    assert ask.main([folder, "Is Alex a wumpus?"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: {folder} does not fit llama: missing ['{DOWN}']")


@pytest.mark.parametrize(
    "harmless",
    [
        lambda folder: change_weights(folder, lambda w: {f"base_causallm.{key}": each for key, each in w.items()}),
        lambda folder: change_weights(
            folder, lambda w: {f"module.base_causallm.{key}": each for key, each in w.items()}
        ),
        lambda folder: change_weights(folder, lambda w: {f"_orig_mod.{key}": each for key, each in w.items()}),
        lambda folder: change_weights(
            folder, lambda w: {key.replace("layers.0.", "layers.0._fsdp_wrapped_module."): w[key] for key in w}
        ),
        lambda folder: change_weights(folder, lambda w: {key.removeprefix("model."): each for key, each in w.items()}),
        lambda folder: change_weights(
            folder, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
        lambda folder: change_weights(
            folder,
            lambda w: (
                {f"base_causallm.{key}": each for key, each in w.items()}
                | {"embedding.weight": w["model.embed_tokens.weight"].clone()}
            ),
        ),
        lambda folder: shard(folder),
        lambda folder: as_bin(folder, lambda weights: weights),
    ],
    ids=["published", "parallel", "compiled", "FSDP", "body alone", "old buffers", "second table", "sharded", "bin"],
)
def test_complete_folders_in_other_forms_are_loaded(tmp_path, harmless):
    folder = trained_folder(tmp_path)
    trained = initial(run(load_model_path=folder))
    harmless(folder)
    assert equal(initial(run(load_model_path=folder)), trained)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_may_be_absent_where_it_is_tied(tmp_path, is_tied):
    folder = trained_folder(tmp_path)
    change_config(folder, tie_word_embeddings=is_tied)
    change_weights(folder, without("lm_head.weight"))
    if is_tied:
        model = initial(run(load_model_path=folder)).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    else:
        with pytest.raises(InputError, match=r"missing \['lm_head.weight'\]"):
            initial(run(load_model_path=folder))


@pytest.mark.parametrize("absent", ["lm_head.weight", "transformer.wte.weight"])
def test_one_name_of_a_tied_weight_is_enough_in_a_state_dict(tmp_path, absent):
    trained = make("gpt2", markers=True, seed=1)
    torch.save(without(absent)(trained.model.state_dict()), tmp_path / "tied.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    assert equal(initial(run(model_id=folder, load_model_path=str(tmp_path / "tied.pt"))), trained)


STATE_DICTS = {
    "a weight is missing": (without("transformer.ln_f.bias"), r"missing \['transformer.ln_f.bias'\]"),
    "a weight is not finite": (
        put(transformer__ln_f__bias=torch.full((32,), torch.inf)),
        r"values that are not finite: \['transformer.ln_f.bias'\]",
    ),
    "quantized": (
        put(transformer__ln_f__bias=torch.ones(32, dtype=torch.int8)),
        r"of another shape \['transformer.ln_f.bias'\] \(\[32\] of torch.int8, not \[32\] of torch.float32\)",
    ),
    "two heads for one": (
        lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1},
        "different values in transformer.wte.weight and lm_head.weight, which are one weight in gpt2",
    ),
    "twice": (
        lambda state: state | {f"module.{key}": value for key, value in state.items()},
        "has weights twice, with and without prefixes",
    ),
    "8 bits": (
        lambda state: state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"].to(torch.float8_e4m3fn)},
        r"of another shape \['transformer.ln_f.bias'\] \(\[32\] of torch.float8_e4m3fn",
    ),
    "sparse": (
        lambda state: state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"].to_sparse()},
        r"of another shape \['transformer.ln_f.bias'\]",
    ),
    "numbered": (lambda state: dict(enumerate(state.values())), r"is not a state dict of tensors \(dict\)"),
    "not tensors alone": (
        lambda state: state | {"epoch": 3},
        r"is not a state dict of tensors \(\w+\); \['epoch'\] are not tensors: extract the others with `python -c",
    ),
    "nested": (
        lambda state: {"epoch": 3, "optimizer": {"step": torch.ones(1)}, "model_state_dict": state},
        r"they are in \['model_state_dict'\]: extract them with `python -c 'import torch; torch.save\(torch.load\(",
    ),
    "nested twice": (
        lambda state: {"state": {"module": state}, "lr": 0.1},
        r"they are in \['state'\]\['module'\]",
    ),
}


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_state_dicts_that_are_not_what_they_seem(tmp_path, kind):
    change, message = STATE_DICTS[kind]
    torch.save(change(make("gpt2", markers=False, seed=1).model.state_dict()), tmp_path / "some.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    with pytest.raises(InputError, match=message):
        initial(run(model_id=folder, load_model_path=str(tmp_path / "some.pt")))


@pytest.mark.parametrize("form", [lambda state: {"model": state}, lambda state: state | {"epoch": 3}])
def test_the_printed_way_out_of_a_nested_state_dict_works(tmp_path, form):
    trained = make("gpt2", markers=False, seed=1)
    torch.save(form(trained.model.state_dict()), tmp_path / "it's nested.pt")
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    config = run(model_id=folder, load_model_path=str(tmp_path / "it's nested.pt"))
    with pytest.raises(InputError) as caught:
        initial(config)
    command = str(caught.value).split("`")[1]
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    config = config.model_copy(update={"load_model_path": str(tmp_path / "weights.pt"), "method": "cot"})
    assert equal(initial(config), trained)


def test_a_single_safetensors_file_is_a_state_dict(tmp_path):
    trained = make("llama", markers=True, seed=1)
    save_file(
        {f"base_causallm.{key}": value for key, value in trained.model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    folder = save_plain(make("llama", markers=False), tmp_path / "base")
    assert equal(initial(run(model_id=folder, load_model_path=str(tmp_path / "a.safetensors"))), trained)


def test_checkpoints_of_deepspeed_are_refused_with_the_way_out(tmp_path):
    shards = tmp_path / "a run" / "global_step10"
    shards.mkdir(parents=True)
    file = shards / "mp_rank_00_model_states.pt"
    torch.save({"module": make("gpt2", markers=False).model.state_dict()}, file)
    for named in (shards, shards.parent):
        with pytest.raises(InputError, match="is a DeepSpeed checkpoint, whose weights lie in pieces") as caught:
            initial(run(load_model_path=str(named)))
        assert f"`python '{shards.parent}/zero_to_fp32.py' '{shards.parent}' OUT`" in str(caught.value)
    folder = save_plain(make("gpt2", markers=False), tmp_path / "base")
    with pytest.raises(InputError, match=r"a shard of a DeepSpeed checkpoint: .* zero_to_fp32.py"):
        initial(run(model_id=folder, load_model_path=str(file)))


def test_an_adapter_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds a LoRA adapter and not a model; merge it"):
        initial(run(load_model_path=str(tmp_path)))


def test_a_head_of_its_own_stays_where_markers_are_added(tmp_path):
    """Two tables in the file and `tie_word_embeddings` in config.json: the file is what was trained."""
    folder = save_plain(make("llama", markers=False, seed=1), tmp_path / "base")
    change_config(folder, tie_word_embeddings=True)
    head = load_file(Path(folder) / "model.safetensors")["lm_head.weight"]
    loaded = initial(run(load_model_path=folder))
    assert torch.equal(loaded.model.get_output_embeddings().weight[: len(head)], head)
    export.export(folder, tmp_path / "out", "unused")
    again = initial(run(load_model_path=str(tmp_path / "out")))
    assert torch.equal(again.model.get_output_embeddings().weight[: len(head)], head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": {"latent_token_id": 5}}, "token_ids of coconut.json has latent_token_id; save the model again"),
        ({"c_thought": None}, "coconut.json names no c_thought; name a checkpoint of a run"),
    ],
)
def test_settings_that_lack_something(tmp_path, change, message):
    folder = trained_folder(tmp_path)
    file = Path(folder) / "coconut.json"
    settings = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(InputError, match=message):
        TrainedModel.load(folder)


def test_a_thought_that_is_another_token_for_the_tokenizer(tmp_path):
    folder = trained_folder(tmp_path)
    file = Path(folder) / "coconut.json"
    ids = {"latent_token_id": 5, "start_latent_id": 6, "end_latent_id": 7, "eos_token_id": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"token_ids": ids}))
    with pytest.raises(InputError, match="says that token 5 stands for a thought, the tokenizer has"):
        TrainedModel.load(folder)
