"""The entry's manners: exit status 2 and one message for what a user can put right, dry runs, shipped files."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import hardware
import launching
import pytest
import tiny
import yaml
from test_files import BAD_FILES
from test_summary import typed

from coconut_ds import train
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.run_file import load_run_config, override

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_process")
RUNS = sorted((ROOT / "run_configs").glob("*.yaml"))


@pytest.fixture
def run(tmp_path) -> dict:
    return tiny.run(tmp_path) | {
        "save_path": str(tmp_path / "runs"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2_offload.json"),
    }


def error_of(run: dict, folder: Path, capsys, *overrides: str) -> str:
    """What the entry prints to standard error when it refuses a run; its exit status is checked."""
    assert train.main(["--run", str(launching.write_run(run, folder)), *overrides]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return captured


@pytest.mark.parametrize("key", ["train_path", "val_path"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_ends_with_status_2_and_its_message(run, tmp_path, capsys, kind, key):
    content, message = BAD_FILES[kind]
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    error = error_of(run, tmp_path, capsys, f"{key}={path}")
    assert error.startswith(f"error: {path}")
    assert message in error


def test_an_example_longer_than_the_model_s_positions(run, tmp_path, capsys):
    error = error_of(run, tmp_path, capsys, "model.n_positions=24")
    assert f"{run['train_path']}: record " in error
    assert "the model has 24 positions" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "learning_rate: unknown key"),
        ("num_epochs=some", "num_epochs: 'some': input should be a valid integer"),
        ("deepspeed=none.json", "deepspeed file none.json cannot be read"),
        ("train_batch_size=33 batch_size_training=11 gradient_accumulation_steps=1", "33 cannot be made from 11"),
        ("model=null model_id=openai-community/gpt2-none", "'openai-community/gpt2-none' is neither a folder here"),
        ("load_model_path=nowhere", "'nowhere' is neither a folder here"),
    ],
)
def test_bad_settings_end_with_status_2_and_their_message(run, tmp_path, capsys, override, message):
    assert message in error_of(run, tmp_path, capsys, *override.split())


@pytest.mark.parametrize(
    ("asked", "has", "message"),
    [
        ("fp16", hardware.PLAIN, "precision: fp16, but this device has none; use fp32 or bf16"),
        ("fp16", "", "precision: fp16, but this device has none; use fp32"),
        ("bf16", "fp16", "precision: bf16, but this device has none (needs capability 8.0); use fp16 or fp32"),
        ("bf16", "", "precision: bf16, but this device has none (needs capability 8.0); use fp32"),
    ],
)
def test_a_precision_this_device_has_not_ends_with_status_2(run, tmp_path, capsys, monkeypatch, asked, has, message):
    monkeypatch.setenv(hardware.VARIABLE, has)
    assert error_of(run, tmp_path, capsys, f"precision={asked}") == f"error: {message}\n"


@pytest.mark.parametrize("asked", ["fp16", "bf16"])
def test_a_precision_this_device_has_is_resolved(run, tmp_path, capsys, monkeypatch, asked):
    monkeypatch.setenv(hardware.VARIABLE, hardware.WITH_FP16)
    assert train.main(["--run", str(launching.write_run(run, tmp_path)), "--dry-run", f"precision={asked}"]) == 0
    _, ds_text = capsys.readouterr().out.split("# deepspeed\n")
    assert json.loads(ds_text)[asked]["enabled"] is True


def test_debug_leaves_a_run_that_has_checkpoints_alone(run, tmp_path, capsys):
    (tmp_path / "runs" / "run" / "checkpoints" / "epoch_0001").mkdir(parents=True)
    assert "holds a run, whose records would be lost; set another name" in error_of(run, tmp_path, capsys, "debug=true")


def test_a_missing_run_file(capsys):
    assert train.main(["--run", "none.yaml"]) == 2
    assert "run file none.yaml cannot be read" in capsys.readouterr().err


def test_a_second_interrupt_ends_without_a_traceback(run, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert train.main(["--run", str(launching.write_run(run, tmp_path))]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.ranks
def test_the_launcher_passes_the_status_on_and_the_message_comes_once(run, tmp_path):
    output = launching.train(run, tmp_path, 2, "lerning_rate=1", expect=2)
    assert output.count("lerning_rate: unknown key") == 1


@pytest.mark.ranks
def test_a_port_in_use_is_named_with_the_way_out(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = launching.train_command(launching.write_run(run, tmp_path), 1)
        command[command.index("--master_port") + 1] = str(taken.getsockname()[1])
        done = launching.finish(launching.start(command))
    assert done.returncode == 2, done.stdout
    assert f"error: port {command[4]} is in use, perhaps by another run; give this one another" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.ranks
def test_gradients_that_are_not_finite_stop_a_run_in_fp32(run, tmp_path):
    output = launching.train(run, tmp_path, 1, "lr=1e30", "model.architecture=llama", "batch_size_training=2", expect=2)
    assert re.search(r"error: gradients are not finite at optimizer step \d, nothing was updated", output), output


_OUT_OF_MEMORY = """
import sys
import torch
from coconut_ds import train
from coconut_ds.training import session, step

def fails(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore of it.")

NAMED = fails
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("step.accumulate_gradients", "after optimizer step 0"),
        ("session.build_engine", "before the first optimizer step"),
    ],
)
def test_out_of_memory_on_the_card_says_what_to_lower(run, tmp_path, name, when):
    code = _OUT_OF_MEMORY.replace("NAMED", name)
    command = [sys.executable, "-c", code, "--run", str(launching.write_run(run, tmp_path))]
    done = launching.finish(launching.start(command))
    assert done.returncode == 2, done.stdout
    said = f"error: out of memory on the card, {when}: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert f"{said} Lower batch_size_training" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.ranks
def test_dry_run_prints_both_configurations_and_trains_nothing(run, tmp_path):
    output = launching.train(run, tmp_path, 2, "--dry-run", "lr=3e-4", "train_batch_size=64")
    _, run_text, ds_text = output.replace("# deepspeed", "# run").split("# run\n")
    assert yaml.safe_load(run_text)["lr"] == 3e-4
    ds_config, _ = json.JSONDecoder().raw_decode(ds_text)
    assert ds_config["train_batch_size"] == 64
    assert ds_config["zero_optimization"]["stage"] == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_loads(path):
    config = load_run_config(path)
    read_ds_json(ROOT / config.deepspeed)
    text = path.read_text()
    assert text.startswith("#"), "the header says how to start it and on what"
    assert f"run_configs/{path.name}" in text


COMMON = {
    "lr": 1e-4,
    "weight_decay": 0.01,
    "train_batch_size": 128,
    "uniform_prob": 0.0,
    "pad_latent_to_max": True,
    "model_id": "openai-community/gpt2",
    "seed": 0,
}
LONG = {"c_thought": 1, "epochs_per_stage": 5, "max_latent_stage": 6, "num_epochs": 50, "reset_optimizer": "stage"}
GSM = {"c_thought": 2, "epochs_per_stage": 3, "max_latent_stage": 3, "num_epochs": 25, "reset_optimizer": "stage"}
COT = {"c_thought": 0, "epochs_per_stage": 1, "max_latent_stage": 0, "reset_optimizer": False}
PUBLISHED = {
    "prosqa": LONG | {"method": "coconut", "max_new_tokens": 128},
    "prosqa_plain": LONG | {"method": "coconut", "latent_context": None, "max_new_tokens": 128},
    "prosqa_cot": COT | {"method": "cot", "num_epochs": 50, "max_new_tokens": 128},
    "prontoqa_coconut": LONG | {"method": "coconut", "latent_context": None, "max_new_tokens": 128},
    "prontoqa_coconut_eval": LONG | {"only_eval": True, "latent_context": None},
    "gsm_cot": COT | {"method": "cot", "num_epochs": 25, "save_only_improve": True, "max_new_tokens": 64},
    "gsm_coconut": GSM | {"method": "coconut", "latent_context": None, "resume": 3, "max_new_tokens": 64},
    "gsm_coconut_eval": GSM | {"only_eval": True, "latent_context": None, "max_new_tokens": 64},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_runs_are_the_published_recipes(name):
    config = load_run_config(ROOT / "run_configs" / f"{name}.yaml")
    published = COMMON | PUBLISHED[name]
    assert {key: getattr(config, key) for key in published} == published


def test_started_by_path_from_anywhere_and_without_a_launcher(run, tmp_path):
    environment = {key: value for key, value in launching.environment().items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "coconut_ds" / "train.py"), "--run", str(launching.write_run(run, tmp_path))]
    done = subprocess.run(
        [*command, "debug=true"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "  best      accuracy" in done.stdout


def test_launch_sh_names_what_is_wrong():
    def launch(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
        command = ["bash", str(ROOT / "launch.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    assert "./launch.sh demo" in launch("help").stdout
    assert launch("nonsense").returncode == 2
    assert "unknown command 'nonsense'" in launch("nonsense").stderr
    assert "no such run file: none.yaml" in launch("none.yaml").stderr


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "$HOME `x`", "x #1", "a: b & c", "ünï 数"])
def test_launch_sh_hands_paths_on_as_they_are(tmp_path, name):
    """DeepSpeed's launcher is a stand-in that prints its words; the environment is one that is set up."""
    stand_ins = tmp_path / "bin"
    launcher = stand_ins / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    for package in (launcher, launcher.parent):
        (package / "__init__.py").touch()
    (launcher / "runner.py").write_text("import sys\nsys.stdout.write(chr(0).join([*sys.argv[1:], '']))\n")
    python = f"""[[ "$*" == *'print(sys.prefix)'* ]] && echo {stand_ins} || exec {sys.executable} "$@\""""
    (stand_ins / "python").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (stand_ins / "python").chmod(0o755)
    settings = (ROOT / "constraints.txt").read_bytes() + (ROOT / "setup.cfg").read_bytes()
    mark = subprocess.run(["cksum"], input=settings, capture_output=True, check=True).stdout
    (stand_ins / ".coconut_ds").write_bytes(mark)
    (stand_ins / ".built").touch()
    place = {"PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(stand_ins)}
    environment = {**os.environ, **place, "VIRTUAL_ENV": sys.prefix, "RANKS": "1", "PYTHONPATH": str(stand_ins)}

    def launched(*arguments: str) -> list[str]:
        command = ["bash", str(ROOT / "launch.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
        *shown, words = done.stdout.split("+ deepspeed")[-1].split("\n", 1) if "+ " in done.stdout else [done.stdout]
        if shown:
            assert typed(shown[0]) == words.split("\0")[:-1]
        return words.split("\0")[:-1]

    run = launching.write_run({"method": "cot", "train_path": "t", "val_path": "v", "name": name}, tmp_path / name)
    run = run.rename(run.with_name(f"{name}.yaml"))
    assert launched(str(run), "lr=1")[-3:] == ["--run", str(run), "lr=1"]
    words = ["--verbose", override("val_path", name)]
    assert launched(str(run), *words)[-3:] == [str(run), *words]
    checkpoint = tmp_path / name / "checkpoints" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    (tmp_path / name / "run_config.yaml").write_bytes(run.read_bytes())
    given = launched("eval", str(checkpoint))
    config = load_run_config(given[given.index("--run") + 1], given[given.index("--run") + 2 :])
    assert config.load_model_path == str(checkpoint)
