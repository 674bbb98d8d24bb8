"""A run started again: what differs from what it was trained with is said, and a finished run stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import launching
import pytest
import tiny
import yaml

from coconut_ds import train
from coconut_ds.commands import sweep
from coconut_ds.config.run_file import load_run_config
from coconut_ds.runs.changes import changed_keys

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of three epochs, trained once for all tests."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder)
    start_apart(folder)
    return folder


def write(folder: Path) -> None:
    run = tiny.run(folder) | {"save_path": str(folder / "runs"), "num_epochs": 3, "batch_size_training": 4}
    run["deepspeed"] = str(launching.ROOT / "ds_configs" / "zero0.json")
    launching.write_run(run, folder)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of it; its paths still lead to the first one."""
    shutil.copytree(trained, tmp_path / "copy")
    text = (tmp_path / "copy" / "run.yaml").read_text()
    (tmp_path / "copy" / "run.yaml").write_text(text.replace(str(trained / "runs"), str(tmp_path / "copy" / "runs")))
    return tmp_path / "copy"


def start(folder: Path, *words: str) -> int:
    """In this process, which DeepSpeed lets build no second engine: of runs that have nothing to train."""
    return train.main(["--run", str(folder / "run.yaml"), *words])


def start_apart(folder: Path, *words: str) -> str:
    """In a process of its own; what it says."""
    done = launching.without_launcher(["coconut_ds/train.py", "--run", str(folder / "run.yaml"), *words])
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def records(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the run but its log."""
    run_folder = folder / "runs" / "run"
    files = [path for path in run_folder.rglob("*") if path.is_file() and path.name != "run.log"]
    return {
        path.relative_to(run_folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(files)
    }


def listed(said: str) -> list[str]:
    return [line.removeprefix("  - ") for line in said.splitlines() if line.startswith("  - ")]


def other_data(folder: Path, name: str = "prosqa_train.json") -> Path:
    """One example more than the run was trained on."""
    examples = json.loads((folder / name).read_text())
    (folder / "other.json").write_text(json.dumps([*examples, examples[0]]))
    return folder / "other.json"


def test_a_finished_run_says_that_nothing_was_trained_and_stays_as_it_is(folder, capsys):
    before = records(folder)
    assert start(folder) == 0
    said = capsys.readouterr().out
    assert (
        f"{folder}/runs/run is finished, 3 epochs were trained before: nothing was trained now; raise num_epochs"
        in said
    )
    assert "stage  epochs" in said
    assert listed(said) == []
    assert records(folder) == before


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["num_epochs=2"], ["num_epochs: 3 -> 2"]),
        (["lr=0.003", "seed=4"], ["seed: 0 -> 4", "lr: 0.0001 -> 0.003"]),
        (["latent_norm=rms", "max_latent_stage=1"], ["max_latent_stage: 2 -> 1", 'latent_norm: "none" -> "rms"']),
        (["model.n_embd=32"], None),
        (["batch_size_training=auto", "train_batch_size=4"], ["train_batch_size: null -> 4"]),
        (["activation_checkpointing.enabled=true"], None),
    ],
    ids=str,
)
def test_what_a_finished_run_was_not_trained_with_is_listed(folder, capsys, words, changed):
    before = records(folder)
    assert start(folder, *words) == 0
    said = capsys.readouterr().out
    assert "nothing was trained now, and the results below are not those of this command" in said
    assert "another name=" in said
    found = listed(said)
    assert found == changed if changed else len(found) == 1
    # The table is that of the run as it was trained.
    assert said.count("best      accuracy") == 1
    assert records(folder) == before


@pytest.mark.parametrize("key", ["train_path", "val_path"])
def test_other_data_under_another_name_and_under_the_same(trained, folder, capsys, key):
    old = Path(load_run_config(folder / "run.yaml").model_dump()[key])
    other = other_data(folder, old.name)
    before = records(folder)
    n = len(json.loads(old.read_text()))
    assert start(folder, f"{key}={other}") == 0
    path, content = listed(capsys.readouterr().out)
    assert path == f'{key}: "{old}" -> "{other}"'
    assert content.startswith(f"content of {key}: {n} examples, SHA-256 ")
    assert f" -> {n + 1} examples, SHA-256 " in content
    # A file that has been written over: the folder's paths lead to the first one, so there the new one is the copy's.
    config = folder / "runs" / "run" / "run_config.yaml"
    config.write_text(config.read_text().replace(str(old), str(other)))
    before = records(folder)
    assert start(folder, f"{key}={other}") == 0
    assert listed(capsys.readouterr().out) == [content]
    assert records(folder) == before


def test_the_same_data_under_another_name(folder, capsys):
    old = load_run_config(folder / "run.yaml").train_path
    shutil.copy(old, folder / "moved.json")
    assert start(folder, f"train_path={folder}/moved.json") == 0
    assert listed(capsys.readouterr().out) == [f'train_path: "{old}" -> "{folder}/moved.json" (the same content)']


def test_data_that_is_not_there_is_a_mistake(folder, capsys):
    assert start(folder, "train_path=none.json") == 2
    assert "error: none.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"python": "3.11"}', "{", "[]", '{"data": {"train_path": 1}}', '{"data": null}'])
def test_folders_of_earlier_versions_say_nothing_of_data(folder, capsys, text):
    (folder / "runs" / "run" / "environment.json").write_text(text)
    before = records(folder)
    assert start(folder, f"train_path={other_data(folder)}") == 0
    (line,) = listed(capsys.readouterr().out)
    assert line.startswith("train_path: ")
    assert records(folder) == before


@pytest.mark.parametrize("text", ["not: a key of a run\n", "{", None])
def test_a_configuration_that_cannot_be_read_stops_nothing(folder, capsys, text):
    config = folder / "runs" / "run" / "run_config.yaml"
    config.unlink() if text is None else config.write_text(text)
    assert start(folder) == 0
    said = capsys.readouterr().out
    assert "nothing was trained now" in said
    assert ("what else differs is not known" in said) == (text is not None)


def test_what_it_was_trained_with_is_kept(trained):
    environment = json.loads((trained / "runs" / "run" / "environment.json").read_text())
    assert environment["ranks"] == 1
    assert environment["data"]["train_path"]["examples"] == 8
    assert environment["data"]["val_path"]["examples"] == 4
    assert all(len(file["sha256"]) == 64 for file in environment["data"].values())
    assert "changes" not in environment


@pytest.mark.ranks
def test_more_epochs_train_on_with_what_changed_said_and_kept(folder, capsys):
    said = start_apart(folder, "num_epochs=4", "lr=0.002", f"train_path={other_data(folder)}")
    assert f"resuming from {folder}/runs/run/checkpoints/epoch_0003\nchanged since the run was last started" in said
    found = listed(said)
    assert [line.partition(":")[0] for line in found] == ["train_path", "num_epochs", "lr", "content of train_path"]
    run_folder = folder / "runs" / "run"
    assert [event["epoch"] for event in launching.events(run_folder, "eval")] == [1, 2, 3, 4]
    assert yaml.safe_load((run_folder / "run_config.yaml").read_text())["lr"] == 0.002
    environment = json.loads((run_folder / "environment.json").read_text())
    assert environment["data"]["train_path"]["examples"] == 9
    assert environment["changes"] == [{"after_step": 6, "change": line} for line in found]
    # Started once more: it is finished, with the settings it was last trained with.
    assert start(folder, "num_epochs=4", "lr=0.002", f"train_path={folder}/other.json") == 0
    assert listed(capsys.readouterr().out) == []


@pytest.mark.ranks
def test_a_run_that_lost_its_last_checkpoint_goes_on_and_says_what_changed(folder):
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / "epoch_0003")
    said = start_apart(folder, "lr=0.002")
    assert "epoch_0002\nchanged since the run was last started (before -> now):\n  - lr: 0.0001 -> 0.002\n" in said
    assert "nothing was trained" not in said
    assert (folder / "runs" / "run" / "checkpoints" / "epoch_0003").is_dir()


@pytest.mark.ranks
def test_goes_on_without_a_word_where_nothing_changed(folder):
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / "epoch_0003")
    assert "changed since" not in start_apart(folder)


@pytest.mark.ranks
def test_killed_before_its_end_was_recorded_and_asked_for_fewer_epochs(folder):
    run_folder = folder / "runs" / "run"
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"end"' in lines[-1]
    (run_folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    before = records(folder)
    said = start_apart(folder, "num_epochs=2", "lr=0.002")
    assert "nothing was trained now" in said
    assert listed(said) == ["num_epochs: 3 -> 2", "lr: 0.0001 -> 0.002"]
    assert records(folder) == before


def test_an_interrupted_run_asked_for_less_than_it_has_is_not_called_trained_to_its_end(folder):
    """Nothing is written, no `end` either: the run was asked for more epochs before."""
    run_folder = folder / "runs" / "run"
    (run_folder / "run_config.yaml").write_text(
        (run_folder / "run_config.yaml").read_text().replace("num_epochs: 3", "num_epochs: 600")
    )
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    before = records(folder)
    said = start_apart(folder, "num_epochs=2")
    assert listed(said) == ["num_epochs: 600 -> 2"]
    assert "resuming from" not in said
    assert records(folder) == before


@pytest.mark.ranks
def test_another_number_of_ranks_and_another_deepspeed_file_under_the_same_name_are_listed(folder):
    values = json.loads((folder / "runs" / "run" / "environment.json").read_text())
    (folder / "runs" / "run" / "environment.json").write_text(json.dumps(values | {"ranks": 4, "changes": 5}))
    assert "ranks: 4 -> 1" in listed(start_apart(folder))
    stored = json.loads((folder / "runs" / "run" / "ds_config.json").read_text())
    stored["zero_optimization"]["stage"] = 2
    stored["bf16"]["enabled"] = True
    (folder / "runs" / "run" / "ds_config.json").write_text(json.dumps(stored))
    changed = listed(start_apart(folder, "num_epochs=4"))
    assert "deepspeed, bf16.enabled: true -> false" in changed
    assert any(line.startswith("deepspeed, zero_optimization.stage: 2 -> ") for line in changed)


@pytest.mark.ranks
def test_a_finished_run_that_saved_only_what_was_better_is_not_trained_again(tmp_path, capsys):
    write(tmp_path)
    start_apart(tmp_path, "save_only_improve=true", "lr=0")
    (saved,) = (tmp_path / "runs" / "run" / "checkpoints").glob("epoch_*")
    assert saved.name == "epoch_0001"
    before = records(tmp_path)
    assert start(tmp_path, "save_only_improve=true", "lr=0") == 0
    assert "nothing was trained now" in capsys.readouterr().out
    assert records(tmp_path) == before


def test_a_sweep_does_not_take_a_run_on_other_data_for_the_result_of_its_line(trained, folder, capsys):
    line = f"{folder}/run.yaml"
    (folder / "list.txt").write_text(line)
    assert sweep.main(["--list", str(folder / "list.txt")]) == 0
    environment = folder / "runs" / "run" / "environment.json"
    values = json.loads(environment.read_text())
    values["data"]["train_path"]["sha256"] = "0" * 64
    environment.write_text(json.dumps(values))
    assert sweep.main([str(folder / "list.txt")]) == 2
    assert "was trained with another content of train_path; rename one" in capsys.readouterr().err


def test_auto_and_the_folder_s_place_are_no_change(folder):
    asked = load_run_config(folder / "run.yaml", ["eval_batch_size=auto"])
    # Resolved before a run starts.
    assert changed_keys(folder / "runs" / "run", asked).keys() == {"activation_checkpointing"}
