"""The folder of a trained model: written, loaded, uploaded, and used by plain transformers."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, pipeline

from coconut_ds import Coconut, LatentContext
from coconut_ds.commands import export
from coconut_ds.errors import InputError
from coconut_ds.model import folder as pretrained
from coconut_ds.model.backbone import Backbone, add_markers
from coconut_ds.model.scratch import scratch_backbone, word_tokenizer

WINDOWS = {
    "plain": None,
    "window of three": LatentContext((0.6, 0.3, 0.1)),
    "last pass, scaled": LatentContext((0.1, 0.3, 0.6), scope="last_pass", norm="rms"),
    "learned": LatentContext((0.5, 0.3, 0.2), learned=True, norm="embedding"),
    "projected": LatentContext(projection=8),
}
SETTINGS = {
    "name": "small",
    "method": "coconut",
    "c_thought": 1,
    "max_latent_stage": 2,
    "pad_latent_to_max": True,
    "stage": 2,
    "epochs": 7,
    "data": {"training": "prosqa_train.json", "validation": "prosqa_valid.json"},
    "base_model": "openai-community/gpt2",
    "results": {"accuracy": 0.875, "n_correct": 7, "n_total": 8, "valid_loss": 0.25, "mean_new_tokens": 5.0},
}
INPUTS = torch.tensor([[7, 8, 9, tiny.START, tiny.LATENT, tiny.LATENT, tiny.END, 11, 12]])


def words(n_embd: int = 16) -> Backbone:
    """A model with a tokenizer, so that its folder is complete."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["Alex is a wumpus. Is Alex a wumpus or a lempus?"], 64)
    backbone = scratch_backbone("gpt2", tokenizer, n_layer=1, n_embd=n_embd, n_head=2, n_positions=64, dropout=0.0)
    add_markers(backbone)
    return backbone


def coconut(backbone: Backbone, **settings: Any) -> Coconut:
    start, end, latent = (backbone.marker_ids()[f"<|{name}|>"] for name in ("start-latent", "end-latent", "latent"))
    model = Coconut(
        backbone.model,
        latent_token_id=latent,
        start_latent_id=start,
        end_latent_id=end,
        eos_token_id=backbone.tokenizer.eos_token_id,
        latent_context=LatentContext((0.6, 0.3, 0.1)),
    )
    model.training_settings = SETTINGS | settings
    return model


def write_run_folder(folder: Path, backbone: Backbone, **settings: Any) -> None:
    """As a run writes it."""
    window = {"latent_context": {"weights": [0.6, 0.3, 0.1], "scope": "sequence", "learned": False}}
    pretrained.write_folder(folder, backbone.model, backbone.tokenizer, SETTINGS | window | settings)


@pytest.mark.parametrize("context", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_was_saved_and_loaded_has_equal_logits(tmp_path, family, context):
    model = tiny.coconut(family, context, plain=True).eval()
    if model.latent_window.logits is not None:
        model.latent_window.logits.data += torch.tensor([0.3, -0.2, 0.5])
    model.save_pretrained(tmp_path / "model")
    loaded = Coconut.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(INPUTS).logits, model(INPUTS).logits)
    assert not loaded.training
    assert loaded.latent_context == model.latent_context
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(Coconut.from_pretrained(tmp_path / "again")(INPUTS).logits, model(INPUTS).logits)


def test_what_is_known_of_the_training_travels_with_the_weights_but_for_results(tmp_path):
    backbone = words()
    write_run_folder(tmp_path / "run", backbone)
    Coconut.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved", backbone.tokenizer)
    stored = json.loads((tmp_path / "saved" / "coconut.json").read_text())
    assert stored.items() >= {key: value for key, value in SETTINGS.items() if key != "results"}.items()
    # They may have been trained since they were evaluated.
    assert "results" not in stored
    assert "have not been evaluated" in (tmp_path / "saved" / "README.md").read_text()


def test_a_folder_that_is_written_again_keeps_nothing_of_the_model_before(tmp_path):
    learned = tiny.coconut("gpt2", WINDOWS["learned"])
    learned.save_pretrained(tmp_path)
    assert (tmp_path / "latent_window.safetensors").is_file()
    tiny.coconut("gpt2").save_pretrained(tmp_path)
    assert pretrained.stored_window(str(tmp_path)) == {}
    pretrained.write_folder(tmp_path, tiny.backbone("gpt2"), None, None)
    assert not (tmp_path / "README.md").exists()


def test_a_learned_window_that_is_missing_is_not_passed_over(tmp_path):
    tiny.coconut("gpt2", WINDOWS["learned"]).save_pretrained(tmp_path)
    (tmp_path / "latent_window.safetensors").unlink()
    with pytest.raises(InputError, match=r"learned its latent window, and latent_window.safetensors is missing"):
        Coconut.from_pretrained(tmp_path)


def test_a_model_saved_outside_of_a_run_can_be_exported(tmp_path):
    backbone = words()
    coconut(backbone).save_pretrained(tmp_path / "model", backbone.tokenizer)
    settings = json.loads((tmp_path / "model" / "coconut.json").read_text())
    del settings["method"]
    (tmp_path / "model" / "coconut.json").write_text(json.dumps(settings))
    assert export.main([str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "continuous thoughts" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("coconut", (True, True)),
        ("pause_as_thought", (False, True)),
        ("pause", (False, False)),
        ("cot", (False, False)),
    ],
)
def test_token_ids_that_a_run_does_not_store_come_from_the_tokenizer(tmp_path, method, expected):
    backbone = words()
    pretrained.write_folder(tmp_path, backbone.model, backbone.tokenizer, SETTINGS | {"method": method})
    loaded = Coconut.from_pretrained(tmp_path)
    ids = backbone.marker_ids()
    has_thoughts, has_markers = expected
    assert loaded.latent_token_id == (ids["<|latent|>"] if has_thoughts else None)
    assert loaded.start_latent_id == (ids["<|start-latent|>"] if has_markers else None)
    assert loaded.eos_token_id == backbone.tokenizer.eos_token_id


def test_a_plain_model_is_no_coconut(tmp_path):
    words().model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no coconut.json.*build one around a plain model"):
        Coconut.from_pretrained(tmp_path)


def test_a_run_folder_and_a_missing_one_are_told_apart(tmp_path):
    for epoch in (1, 12):
        (tmp_path / "run" / "checkpoints" / f"epoch_{epoch:04d}").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run folder; .* the newest is .*epoch_0012"):
        Coconut.from_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="there is no such folder"):
        Coconut.from_pretrained(tmp_path / "nowhere")


def test_the_backbone_works_in_a_pipeline(tmp_path):
    backbone = words()
    coconut(backbone).save_pretrained(tmp_path, backbone.tokenizer)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (answer,) = generator("Is Alex a wumpus", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("Is Alex a wumpus")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.lm_head.weight, backbone.model.lm_head.weight)


def test_the_card_names_data_stage_thoughts_window_and_results(tmp_path):
    write_run_folder(tmp_path, words())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("prosqa_valid.json", "accuracy", 0.875)
    for text in (
        "weighted average of the last 3 hidden states of the sequence (weights 0.6, 0.3, 0.1, newest first)",
        "| stage of the weights | 2 |",
        "| thoughts per replaced step | 1 |",
        "| training data | prosqa_train.json |",
        "accuracy 87.5% (7 of 8)",
    ):
        assert text in card.content


def test_the_card_of_weights_without_an_evaluation_says_so(tmp_path):
    write_run_folder(tmp_path, words(), results=None, base_model=None)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "have not been evaluated" in card.content


@pytest.mark.parametrize(
    ("method", "about"),
    [
        ("coconut", "trained to reason in continuous thoughts"),
        ("no_curriculum", "trained to reason in continuous thoughts"),
        ("pause_as_thought", "trained with pauses before its answer"),
        ("cot", "trained without continuous thoughts, by the method `cot`"),
        ("icot", "trained without continuous thoughts, by the method `icot`"),
    ],
)
def test_the_card_says_what_kind_of_model_it_is(tmp_path, method, about):
    write_run_folder(tmp_path, words(), method=method)
    card = ModelCard.load(tmp_path / "README.md")
    assert about in card.content
    has_thoughts = about.startswith("trained to reason")
    assert ("coconut" in card.data.tags) is has_thoughts
    assert ("latent stages" in card.content) is (not about.startswith("trained without"))


def test_the_card_says_how_a_thought_is_made(tmp_path):
    settings = {"latent_context": None, "latent_projection": 8, "solver": {"kind": "jacobi", "iterations": 2}}
    pretrained.write_folder(tmp_path, words().model, None, SETTINGS | settings)
    said = "are fed the hidden state before them, through a trained projection, in 2 Jacobi iterations over all of them"
    assert said in " ".join((tmp_path / "README.md").read_text().split())


def test_the_card_counts_the_weights_that_are_written(tmp_path):
    backbone = words(n_embd=256)
    weights = {name: value.clone() for name, value in backbone.model.named_parameters()}
    expected = sum(value.numel() for value in weights.values())
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.data = torch.empty(0)  # as ZeRO-3 leaves them
    pretrained.write_folder(tmp_path, backbone.model, backbone.tokenizer, SETTINGS, weights)
    assert expected > 500_000
    assert f"{expected / 1e6:.2f} M parameters" in (tmp_path / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for the files of one folder."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.folder / self.path.split("/resolve/main/")[-1]
        if self.path.startswith("/api/models/"):
            self.reply(200, json.dumps({"id": "someone/small", "sha": "1" * 40, "siblings": []}).encode())
        elif "/resolve/main/" in self.path and file.is_file():
            self.reply(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": "1" * 40})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "1" * 40})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of this machine in place of the hub, with the model of `words` as someone/small."""
    backbone = words()
    write_run_folder(tmp_path / "served", backbone)
    handler = type("ThisHub", (Hub,), {"folder": tmp_path / "served"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield backbone
    server.shutdown()
    server.server_close()


def test_a_model_comes_from_the_hub(hub, tmp_path):
    assert pretrained.stored_settings("someone/small")["stage"] == 2
    assert pretrained.stored_window("someone/small") == {}


def test_an_upload_that_the_hub_does_not_take_leaves_the_folder(tmp_path, monkeypatch, capsys):
    backbone = words()
    coconut(backbone).save_pretrained(tmp_path / "model", backbone.tokenizer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--push-to-hub", "someone/small"]
    assert export.main(command) == 2
    error = capsys.readouterr().err
    assert "error: push_to_hub: someone/small was not uploaded (" in error
    assert "out is complete" in error
    assert (tmp_path / "out" / "README.md").is_file()


def test_an_upload_is_of_the_whole_folder(tmp_path, monkeypatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    class FakeHub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options | {"files": sorted(os.listdir(options["folder_path"]))}))
            return "https://hub/someone/small"

    monkeypatch.setattr(pretrained, "HfApi", FakeHub)
    backbone = words()
    coconut(backbone).save_pretrained(
        tmp_path / "small", backbone.tokenizer, push_to_hub=True, repo_id="someone/small", private=True
    )
    assert calls[0] == ("create", {"repo_id": "someone/small", "private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "someone/small"
    assert {"README.md", "coconut.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(
        calls[1][1]["files"]
    )
