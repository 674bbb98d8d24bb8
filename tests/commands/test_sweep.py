"""Sweeps: what is wrong with any run is said before the first one starts, finished runs are skipped, one goes on."""

from __future__ import annotations

import json
import os
import signal
import time

import launching
import pytest
import tiny
import yaml

from coconut_ds.commands import sweep
from coconut_ds.config.run_file import load_run_config
from coconut_ds.errors import InputError

SWEEPS = sorted((launching.ROOT / "run_configs").rglob("*.txt"))


@pytest.fixture
def run_file(tmp_path):
    run = tiny.run(tmp_path) | {"save_path": str(tmp_path / "runs"), "num_epochs": 2}
    return launching.write_run(run, tmp_path)


@pytest.fixture
def data_is_there(monkeypatch):
    """Shipped sweeps need data that only those who run them make."""
    monkeypatch.setattr(sweep.Path, "is_file", lambda path: path.suffix == ".json")


def listed(folder, *lines: str):
    path = folder / "sweep.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def finish(run_file, name: str, epochs: int) -> None:
    config = load_run_config(run_file, [f"name={name}"])
    folder = config.run_folder
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(config.to_yaml())
    events = [{"event": "eval", "epoch": epochs}, {"event": "end", "epochs": epochs, "step": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_unfinished_runs_are_printed_in_order(run_file, tmp_path, capsys):
    for name, epochs in (("done", 2), ("shorter", 1)):
        finish(run_file, name, epochs)
    lines = [f"{run_file} name={name}" for name in ("done", "new", "shorter")]
    path = listed(tmp_path, "# what is tried", "", lines[0], f"{lines[1]} # a comment", lines[2] + " 'lr=1e-3'")
    assert sweep.main(["--list", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [lines[1], lines[2] + " lr=1e-3"]
    assert "runs/done is finished" in captured.err


def test_words_come_back_quoted(run_file, tmp_path, capsys):
    path = listed(tmp_path, f'{run_file} "name=with blank" "adam_betas=[0.9, 0.98]"')
    assert sweep.main(["--list", str(path)]) == 0
    assert capsys.readouterr().out.strip() == f"{run_file} 'name=with blank' 'adam_betas=[0.9, 0.98]'"


def test_a_line_with_seeds_is_a_run_for_each_the_first_of_every_line_first(run_file, tmp_path, capsys):
    lines = [f"{run_file} name=a seeds=[0,3] lr=1e-3", f"{run_file} name=b seeds=[1]", f"{run_file} name=c"]
    path = listed(tmp_path, *lines)
    assert sweep.main(["--list", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run_file} name=a_seed0 seed=0 lr=1e-3",
        f"{run_file} name=b_seed1 seed=1",
        f"{run_file} name=c",
        f"{run_file} name=a_seed3 seed=3 lr=1e-3",
    ]


def test_a_line_without_a_run_file_holds_for_the_runs_below(run_file, tmp_path):
    lines = [f"{run_file} name=a", "lr=0.5 seeds=[1]", f"{run_file} name=b", f"{run_file} name=c lr=0.25"]
    path = listed(tmp_path, *lines, f"{run_file} name=d seed=7", f"{run_file} name=e seeds=[8]")
    configs = [config for _, config in sweep.read_sweep(path)]
    assert [(each.name, each.seed) for each in configs[3:]] == [("d", 7), ("e_seed8", 8)]
    configs = configs[:3]
    assert [(each.name, each.seed, each.lr) for each in configs[1:]] == [("b_seed1", 1, 0.5), ("c_seed1", 1, 0.25)]
    assert (configs[0].name, configs[0].lr) == ("a", load_run_config(run_file).lr)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("RUN name=b learning_rat=1", "line 2: RUN: 1 problem\n  - learning_rat: unknown key"),
        ("RUN name=a", "line 2: writes to FOLDER/runs/a, as line 1 does"),
        ("none.yaml", "line 2: run file none.yaml cannot be read"),
        ("run.json", "line 2: run.json: a run file ends in .yaml or .yml"),
        ("RUN name=b train_path=none.json", "line 2: none.json: not there; data/README.md"),
        ("RUN name=b deepspeed=none.json", "line 2: deepspeed file none.json cannot be read"),
        ("RUN 'name=b", "line 2: No closing quotation"),
        ("RUN name=b seeds=[0,0]", "line 2: seeds=[0,0]: must be one list of different whole numbers"),
        ("RUN name=b seeds=3", "line 2: seeds=3: must be one list"),
        ("RUN name=b seeds=[1] seed=1", "line 2: seeds=[1] seed=1: must be one list"),
        ("name=b seed=1", "line 2: names no run file, and no run is below it"),
        ("name=b RUN seed=1", "line 2: name=b: a run file ends in .yaml or .yml"),
    ],
)
def test_what_is_wrong_is_said_before_a_run_starts(run_file, tmp_path, capsys, line, message):
    path = listed(tmp_path, f"{run_file} name=a", line.replace("RUN", str(run_file)))
    assert sweep.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert message.replace("RUN", str(run_file)).replace("FOLDER", str(tmp_path)) in captured.err
    assert captured.out == ""


def test_a_finished_run_that_was_trained_otherwise_is_no_result_of_its_line(run_file, tmp_path, capsys):
    finish(run_file, "a", 2)
    assert sweep.main([str(listed(tmp_path, f"{run_file} name=a lr=0.3 seed=4"))]) == 2
    assert "runs/a is finished and was trained with another seed, lr; rename one" in capsys.readouterr().err


def test_a_run_of_another_sweep_that_ends_unfinished_is_taken_at_the_end(run_file, tmp_path, monkeypatch, capsys):
    started, elsewhere = [], {"a"}

    class Started:
        is_asked_to_stop = False
        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

        def run(self, words: list[str]) -> int:
            name = words[-1].removeprefix("name=")
            started.append(name)
            finish(run_file, name, 2)
            elsewhere.clear()
            return 0

    monkeypatch.setattr(sweep, "Launcher", Started)
    monkeypatch.setattr(sweep, "trainer_command", lambda run_file, overrides, options: overrides)
    monkeypatch.setattr(sweep, "run_folder_is_held", lambda folder: folder.name in elsewhere)
    path = listed(tmp_path, f"{run_file} name=a", f"{run_file} name=b")
    assert sweep.main([str(path)]) == 0
    assert started == ["b", "a"]
    assert "runs/a is in use by" in capsys.readouterr().err
    elsewhere.add("c")
    assert sweep.main([str(listed(tmp_path, f"{run_file} name=c"))]) == 1, "it is not finished"


def test_a_sweep_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run in it"):
        sweep.read_sweep(listed(tmp_path, "# nothing"))
    with pytest.raises(InputError, match="cannot be read"):
        sweep.read_sweep(tmp_path / "none.txt")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_shipped_sweeps_load_and_say_how_they_are_started(path, data_is_there):
    assert sweep.read_sweep(path)
    assert f"./launch.sh sweep {path.relative_to(launching.ROOT)}" in path.read_text()


def test_the_comparison_of_the_demo_task_is_fifteen_runs(data_is_there):
    runs = sweep.read_sweep(launching.ROOT / "run_configs" / "demo_comparison.txt")
    groups = {name: set() for name in ("coconut", "contextual", "last_pass", "pause_as_thought", "no_cot")}
    for _, config in runs:
        groups[config.name.rpartition("_seed")[0]].add(config.seed)
        assert config.name.endswith(f"_seed{config.seed}")
    assert set(map(frozenset, groups.values())) == {frozenset({0, 1, 2})}


@pytest.mark.ranks
def test_launch_sh_trains_the_list_goes_past_a_failure_and_skips_what_is_finished(run_file, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    lines = [f"{run_file} name=fails train_path={tmp_path}/empty.json", f"{run_file} name=works"]
    path = listed(tmp_path, *lines)
    port = {"MASTER_PORT": str(launching.free_port()), "RANKS": "1"}
    done = launching.finish(launching.start(["./launch.sh", "sweep", str(path)], **port))
    assert done.returncode == 1
    assert f"failed: {lines[0]}" in done.stdout
    assert [event["epochs"] for event in launching.events(tmp_path / "runs" / "works", "end")] == [2]
    again = launching.finish(launching.start(["./launch.sh", "sweep", str(listed(tmp_path, lines[1]))], **port))
    assert again.returncode == 0
    assert "runs/works is finished" in again.stdout
    assert "+ deepspeed" not in again.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the sweep", "to its group"])
def test_a_signal_ends_the_run_under_way_and_starts_no_other(run_file, tmp_path, send):
    values = yaml.safe_load(run_file.read_text()) | {"num_epochs": 4000, "log_every_steps": 1}
    run_file = launching.write_run(values, tmp_path)
    path = listed(tmp_path, *(f"{run_file} name={name}" for name in "ab"))
    process = launching.start(["./launch.sh", "sweep", str(path)], MASTER_PORT=str(launching.free_port()), RANKS="1")
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while not (metrics.exists() and '"train_step"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < give_up
        time.sleep(0.05)
    send(process.pid, signal.SIGTERM)
    done = launching.finish(process)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "stopped as requested" in done.stdout
    assert not (tmp_path / "runs" / "b").exists()
    assert launching.events(tmp_path / "runs" / "a", "end") == []
    assert list((tmp_path / "runs" / "a" / "checkpoints").glob("epoch_*"))
