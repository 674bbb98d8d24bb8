"""The comparison of runs: groups, refusals, and tables in which every number is known."""

from __future__ import annotations

import csv
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.collections import PathCollection

from coconut_ds.analysis import comparison
from coconut_ds.analysis.plots.comparison import draw
from coconut_ds.analysis.solved import solved
from coconut_ds.commands import compare
from coconut_ds.config.run_config import RunConfig

STEPS = [2, 2, 3, 3]


def write_run(folder: Path, name: str, seed: int, right: str, epoch: int = 2, **changes: Any) -> str:
    """A run folder of 2 epochs, with an `x` in `right` for each right answer after `epoch`."""
    run = folder / name
    (run / "predictions").mkdir(parents=True, exist_ok=True)
    config = {"name": name, "save_path": str(folder), "seed": seed, "num_epochs": 2, "coconut": True}
    config |= {"train_path": "train.json", "val_path": "valid.json", **changes}
    (run / "run_config.yaml").write_text(yaml.safe_dump(config))
    write_answers(run, f"epoch_{epoch:04d}", [prediction(index, letter == "x") for index, letter in enumerate(right)])
    return str(run)


def prediction(index: int, correct: bool, **changes: Any) -> dict[str, Any]:
    expected = f"answer {index}"
    return {
        "index": index,
        "question": f"question {index}",
        "expected": expected,
        "given": expected if correct else "",
        "correct": correct,
        "cot_correct": False,
        "text": "",
        "n_steps": STEPS[index % len(STEPS)],
        "n_thoughts": 2,
        "n_new_tokens": 3 + 2 * correct,
        **changes,
    }


def write_answers(run: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = run / "predictions" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Two seeds of `ours`, one of `control`."""
    return [
        write_run(tmp_path, "ours_seed0", 0, "xxx."),
        write_run(tmp_path, "ours_seed1", 1, "xx..", wandb="offline", keep_checkpoints=1),
        write_run(tmp_path, "control-s0", 0, "...x", c_thought=2),
    ]


def printed(arguments: list[str], capsys) -> str:
    assert compare.main(arguments) == 0
    return capsys.readouterr().out


def row_of(text: str, start: str) -> list[str]:
    """The cells of the first table row that starts so; two spaces part them."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_tables_of_known_numbers(runs, capsys):
    text = printed(runs, capsys)
    assert text.startswith("4 questions, predictions epoch_0002\n")
    group = row_of(text, "ours ")
    assert group[:4] == ["ours", "0, 1", "4", "62.5%"]
    # 5 of 8 answers right: 2 thoughts, 3 tokens and 2 more where it is right.
    assert group[5:] == ["bootstrap, seeds x questions", "6.2", "2.0"]
    # Wilson: 3 of 4 and 1 of 4 mirror each other, 2 of 4 is 1/2 -+ z / 2 / sqrt(4 + z^2).
    assert row_of(text, "  ours_seed0") == ["ours_seed0", "0", "4", "75.0%", "30.1% to 95.4%", "Wilson", "6.5", "2.0"]
    assert row_of(text, "  ours_seed1") == ["ours_seed1", "1", "4", "50.0%", "15.0% to 85.0%", "Wilson", "6.0", "2.0"]
    assert row_of(text, "  control-s0")[3:5] == ["25.0%", "4.6% to 69.9%"]
    assert row_of(text, "control ")[5] == "bootstrap, questions"
    assert row_of(text, "steps") == ["steps", "examples", "ours", "control"]
    assert row_of(text, "2 ") == ["2", "2", "100.0%", "0.0%"]
    assert row_of(text, "3 ") == ["3", "2", "25.0%", "50.0%"]
    assert row_of(text, "ours - control")[1] == "+37.5"
    # Seed 0 alone is in both: 2 (1 + 4) / 2^4.
    assert row_of(text, "ours, control") == ["ours, control", "0", "3", "1", "0.62", "0.62"]
    assert "One seed only, so the bootstrap intervals leave out the spread over seeds: control." in text
    assert "75% with 3" in text
    assert "If fewer than 10 answers differ, trust McNemar" in text


def test_json_has_the_numbers_of_the_tables(runs, tmp_path, capsys):
    path = tmp_path / "out.json"
    text = printed([*runs, "--json", str(path)], capsys)
    written = json.loads(path.read_text())
    assert [group["group"] for group in written["groups"]] == ["ours", "control"]
    for group in written["groups"]:
        for each, title in [(group, f"{group['group']} "), *((run, f"  {run['name']}") for run in group["runs"])]:
            low, high = each["interval"]
            assert low <= each["accuracy"] <= high
            assert row_of(text, title)[3:5] == [f"{each['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]
    (pair,) = written["pairs"]
    low, high = (100 * end for end in pair["interval"])
    assert row_of(text, "ours - control")[1:] == [f"{100 * pair['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
    assert pair["mcnemar"] == [{"seed": 0, "only_first": 3, "only_second": 1, "p": 0.625, "p_holm": 0.625}]
    assert written["groups"][0]["accuracy_by_steps"]["3"] == {"examples": 2, "accuracy": 0.25}
    assert written["notes"] == [line[2:] for line in text.splitlines() if line.startswith("- ")]
    # Nothing is left to chance.
    assert printed(runs, capsys) == text


def test_p_values_are_adjusted_over_all_pairs(tmp_path, capsys):
    a = write_run(tmp_path, "a", 0, "x" * 12 + "....")
    b = write_run(tmp_path, "b", 0, "." * 12 + "....")
    c = write_run(tmp_path, "c", 0, "x" * 11 + ".....")
    text = printed([a, b, c], capsys)
    # 12 to 0 and 0 to 11 with factors 3 and 2; 1 to 0 stays 1.
    assert row_of(text, "a, b")[2:] == ["12", "0", f"{2 / 2**12:.2g}", f"{6 / 2**12:.2g}"]
    assert row_of(text, "b, c")[2:] == ["0", "11", f"{2 / 2**11:.2g}", f"{4 / 2**11:.2g}"]
    assert row_of(text, "a, c")[2:] == ["1", "0", "1", "1"]


def test_one_group_alone(tmp_path, capsys):
    text = printed([write_run(tmp_path, "a", 0, "xxxx")], capsys)
    assert row_of(text, "a ")[3:5] == ["100.0%", "100.0% to 100.0%"]
    assert "so the bootstrap has nothing to vary; read Wilson: a." in text
    assert "McNemar" not in text
    assert "difference of" not in text


@pytest.mark.parametrize(
    ("name", "seed", "group"),
    [
        ("demo_seed1", 1, "demo"),
        ("demo-seed1", 1, "demo"),
        ("demo_s12", 12, "demo"),
        ("demo", 0, "demo"),
        ("demo_seed1", 2, "demo_seed1"),
        ("demo_seed10", 0, "demo_seed10"),
        ("demoseed1", 1, "demoseed1"),
        ("_seed1", 1, "_seed1"),
    ],
)
def test_a_group_is_the_name_less_its_seed(name, seed, group):
    assert comparison.group_of(RunConfig(name=name, seed=seed)) == group


def test_labels(tmp_path, runs, capsys):
    text = printed([f"first={runs[0]}", f"first={runs[1]}", f"same={runs[0]}"], capsys)
    assert row_of(text, "first ")[1] == "0, 1"
    assert row_of(text, "same ")[3] == "75.0%"
    # A folder with an equals sign in its name is a folder.
    odd = write_run(tmp_path, "lr=1", 0, "x...")
    assert row_of(printed([odd], capsys), "lr=1 ")[3] == "25.0%"


def test_other_predictions(runs, capsys):
    for run in runs:
        write_answers(Path(run), "eval_test", [prediction(index, True) for index in range(3)])
    text = printed([*runs, "--predictions", "eval_test"], capsys)
    assert text.startswith("3 questions, predictions eval_test\n")
    assert text == printed([*runs, "--predictions", "eval_test.jsonl"], capsys)
    assert printed(runs, capsys).startswith("4 questions, predictions epoch_0002\n")


def test_the_last_epoch_is_compared_and_differing_ones_noted(tmp_path, capsys):
    # The names would sort the other way round.
    write_run(tmp_path, "a", 0, "....", epoch=9999, num_epochs=10_000)
    a = write_run(tmp_path, "a", 0, "xxxx", epoch=10_000, num_epochs=10_000)
    b = write_run(tmp_path, "b", 1, "x...", epoch=1)
    text = printed([a, b], capsys)
    assert row_of(text, "a ")[3] == "100.0%"
    assert "The epochs differ: a 10000, b 1." in text
    assert "b: epoch 1 of 2, not the end of the run." in text
    assert "No seed in common, so no McNemar test: a and b." in text


@pytest.mark.parametrize(
    "changes",
    [
        {"coconut": False, "method": "coconut"},
        {"load_model_path": "first/stage"},
        {"eval_batch_size": 4, "deepspeed": "ds_configs/zero3.json", "activation_checkpointing": {}},
        {"fast": "off"},
        {"batch_size_training": 16, "gradient_accumulation_steps": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_change_the_method_is_free_within_a_group(tmp_path, capsys, changes):
    first = write_run(tmp_path, "a_seed0", 0, "xx..", train_batch_size=64)
    second = write_run(tmp_path, "a_seed1", 1, "xxxx", train_batch_size=64, **changes)
    assert row_of(printed([first, second], capsys), "a ")[:4] == ["a", "0, 1", "4", "75.0%"]


def refusal(arguments: list[str], capsys) -> str:
    assert compare.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"seed": 1, "batch_size_training": 16}, "they differ in batch_size_training (32 and 16)"),
        ({"seed": 1, "lr": 0.5}, "not seeds of one method: they differ in lr (0.0001 and 0.5); label them apart"),
        ({"seed": 0}, "both have seed 0; name one of them"),
        ({"seed": 1, "epoch": 1}, "the last predictions are of epochs 2 and 1; finish the runs"),
    ],
)
def test_a_group_has_seeds_of_one_method(second, message, tmp_path, capsys):
    first = write_run(tmp_path, "a", 0, "xx..")
    other = write_run(tmp_path, "b", right="xx..", **second)
    assert message in refusal([f"g={first}", f"g={other}"], capsys)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([prediction(0, True)], "have 2 and 1 answers"),
        ([prediction(0, True), prediction(2, True)], "index 1 is in one of them only"),
        ([prediction(0, True), prediction(1, True, question="?")], "differ first at index 1, in `question`"),
        ([prediction(0, True, expected="?"), prediction(1, True)], "differ first at index 0, in `expected`"),
        ([prediction(0, True, n_steps=9), prediction(1, True)], "differ first at index 0, in `n_steps`"),
    ],
)
def test_all_runs_answered_the_same_questions(rows, message, tmp_path, capsys):
    first = write_run(tmp_path, "a", 0, "xx")
    other = write_run(tmp_path, "b", 0, "xx")
    write_answers(Path(other), "epoch_0002", rows)
    error = refusal([first, other], capsys)
    assert message in error
    assert f"{first} (epoch_0002) and {other} (epoch_0002)" in error


def test_the_order_of_lines_does_not_matter(tmp_path, capsys):
    first = write_run(tmp_path, "a", 0, "xx.")
    other = write_run(tmp_path, "b", 0, "xx.")
    write_answers(Path(other), "epoch_0002", [prediction(index, index < 2) for index in (2, 0, 1)])
    assert row_of(printed([first, other], capsys), "a, b")[2:4] == ["0", "0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (json.dumps(prediction(0, True)) + '\n{"index": 1, "ques', "line 2: Invalid JSON"),
        (json.dumps({"index": 0, "question": "q"}), "line 1: expected: Field required"),
        (json.dumps(prediction(0, True) | {"correct": "yes"}), "line 1: correct: Input should be a valid boolean"),
        (2 * (json.dumps(prediction(0, True)) + "\n"), "line 2: index 0 stands there twice"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_damaged_predictions(content, message, tmp_path, capsys):
    run = write_run(tmp_path, "a", 0, "x")
    path = Path(run) / "predictions" / "epoch_0002.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal([run], capsys)
    assert str(path) in error
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_is_not_there(tmp_path, runs, capsys):
    assert "missing is not a run folder, it has no run_config.yaml" in refusal([str(tmp_path / "missing")], capsys)
    assert "a label is written LABEL=RUN" in refusal([f"={runs[0]}"], capsys)
    error = refusal([runs[0], "--predictions", "epoch_0003"], capsys)
    assert "has no epoch_0003.jsonl (did you mean 'epoch_0002'?)" in error
    assert f"{tmp_path / 'no' / 'x.json'} cannot be written: No such file" in refusal(
        [*runs, "--json", str(tmp_path / "no" / "x.json")], capsys
    )
    (Path(runs[0]) / "predictions" / "epoch_0002.jsonl").unlink()
    assert "has no epoch_NNNN.jsonl: the run has not ended an epoch" in refusal([runs[0]], capsys)
    (Path(runs[0]) / "run_config.yaml").write_text("learning: 1\n")
    assert "learning: unknown key" in refusal([runs[0]], capsys)


def test_missing_libraries(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    printed(runs, capsys)
    png = tmp_path / "out.png"
    error = refusal([*runs, "--png", str(png)], capsys)
    assert error == "error: matplotlib missing: pip install 'coconut_ds[report]'\n"
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert refusal(runs, capsys) == "error: scipy missing: pip install 'coconut_ds[report]'\n"


def test_importing_it_loads_nothing_heavy():
    heavy = ("torch", "scipy", "matplotlib", "transformers")
    code = f"import sys, coconut_ds.compare; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_markdown(runs, capsys):
    text = printed([*runs, "--markdown"], capsys)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [2 + 5, 2 + 2, 2 + 1, 2 + 1]
    for header, rule, *rows in tables:
        assert {line.count("|") for line in (rule, *rows)} == {header.count("|")}
        first, *others = rule.strip("| ").split(" | ")
        assert set(first) == {"-"}
        assert all(set(cell[:-1]) == {"-"} and cell[-1] == ":" for cell in others)
    cells = [cell.strip() for cell in tables[0][2].strip("|").split("|")]
    assert cells[:4] == ["ours", "0, 1", "4", "62.5%"]


def learning(folder: Path, name: str, seed: int, right: str, *evaluations: tuple[int, float]) -> str:
    """A run of three stages, with the accuracy on the validation set at the end of each epoch."""
    run = write_run(folder, name, seed, right, max_latent_stage=3, c_thought=1, method="coconut", coconut=False)
    events = [
        {"event": "eval", "epoch": epoch, "stage": stage, "step": 10 * epoch, "valid_loss": 0.1, "accuracy": accuracy}
        | {"n_correct": 1, "n_total": 1, "mean_new_tokens": 1.0, "examples_per_s": 1.0}
        for epoch, (stage, accuracy) in enumerate(evaluations, start=1)
    ]
    Path(run, "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_seeds_that_solve_it_and_their_steps(tmp_path, capsys):
    runs = [
        learning(tmp_path, "fast_seed0", 0, "xxxx", (2, 1.0), (2, 0.7), (3, 0.9), (4, 0.8)),
        learning(tmp_path, "fast_seed1", 1, "xxx.", (2, 1.0), (2, 0.7), (3, 0.5), (4, 0.8)),
        learning(tmp_path, "slow_seed0", 0, "x...", (2, 1.0), (2, 1.0), (3, 0.3), (4, 0.7)),
        learning(tmp_path, "slow_seed1", 1, "x...", (2, 1.0), (2, 1.0), (3, 0.9), (4, 0.7)),
        learning(tmp_path, "once_seed0", 0, "xxxx", (2, 1.0), (2, 1.0), (3, 0.9), (4, 0.7)),
    ]
    text = printed([*runs, "--solved", "0.75", "--json", str(tmp_path / "out.json")], capsys)
    assert row_of(text, "group  ") == ["group", "seeds", "solved (75%)", "steps to 75%, by seed"]
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "solved (75%)" in line)
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : start + 4]]
    # Visible steps do not count: 1.0 in stage 2, as there are questions of 3 steps.
    assert rows == [["fast", "2", "2", "30, 40"], ["slow", "2", "0", "never, 30"], ["once", "1", "1", "30"]]
    # 30, 40 against 30, never: no division is nearer to even. Fisher: one of six, on either side.
    assert next(line for line in lines[start:] if line.startswith("fast, slow")).split()[2:] == [
        "1",
        "1",
        "0.33",
        "0.33",
    ]
    assert "fast, once" not in "".join(lines[start:])
    assert json.loads((tmp_path / "out.json").read_text())["solved"]["groups"][0]["steps"] == [30, 40]
    assert "solved" not in printed(runs, capsys)
    unfinished = learning(tmp_path, "short_seed0", 0, "xxxx", (2, 1.0))
    assert "no evaluation of stage 3 or later" in refusal([runs[0], unfinished, "--solved", "0.75"], capsys)
    assert "--solved 95.0: must be above 0 and at most 1" in refusal([*runs, "--solved", "95"], capsys)


def test_tables_as_csv(runs, tmp_path, capsys):
    folder = tmp_path / "tables" / "test"
    printed([*runs, "--csv", str(folder)], capsys)
    names = ("accuracy", "accuracy_by_steps", "differences", "mcnemar")
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.csv" for name in names]
    rows = list(csv.reader((folder / "accuracy.csv").open()))
    assert rows[0][:4] == ["group, run", "seed", "examples", "accuracy"]
    assert [row[0] for row in rows[1:]] == ["ours", "ours_seed0", "ours_seed1", "control", "control-s0"]
    assert rows[1][1:4] == ["0, 1", "4", "62.5%"]


def drawn(runs: list[str]):
    return draw(comparison.compare(comparison.grouped([comparison.read_run(run) for run in runs])))


def test_a_picture_of_accuracies_and_steps(runs):
    left, right = drawn(runs).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ours", "control"]
    means = [float(container.lines[0].get_xdata()[0]) for container in left.containers]
    assert means == [62.5, 25.0]
    dots = [np.asarray(each.get_offsets()) for each in left.collections if isinstance(each, PathCollection)]
    assert [each[:, 0].tolist() for each in dots] == [[75, 50], [25]]
    # Below their group, and apart where seeds are equally good.
    assert 0 < dots[0][0, 1] < dots[0][1, 1] < 0.5
    assert 1 < dots[1][0, 1] < 1.5
    assert [line.get_ydata().tolist() for line in right.lines] == [[100, 25], [0, 50]]
    assert [label.get_text() for label in right.get_xticklabels()] == ["2\nn = 2", "3\nn = 2"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["ours", "control"]
    assert "%" in left.get_xlabel()
    assert "%" in right.get_ylabel()


def test_a_picture_leaves_out_what_says_nothing(tmp_path):
    # All questions have two steps; right answers are longer.
    short, long = write_run(tmp_path, "a", 0, "x."), write_run(tmp_path, "b", 0, "xx")
    _, right = drawn([short, long]).axes
    assert [(*line.get_xdata(), *line.get_ydata()) for line in right.lines] == [(6, 50), (7, 100)]
    assert "tokens" in right.get_xlabel()
    assert len(drawn([short]).axes) == 1


def test_a_picture_of_when_seeds_solve_it(tmp_path):
    runs = [
        learning(tmp_path, "fast_seed0", 0, "xxxx", (2, 1.0), (3, 0.9)),
        learning(tmp_path, "fast_seed1", 1, "xxxx", (2, 1.0), (3, 0.8), (4, 0.9)),
        learning(tmp_path, "slow_seed0", 0, "x...", (2, 1.0), (3, 0.3)),
    ]
    groups = comparison.grouped([comparison.read_run(run) for run in runs])
    compared = {**comparison.compare(groups), "solved": solved(groups, 0.9)}
    _, middle, right = draw(compared).axes
    fast, slow = (np.asarray(each.get_offsets()) for each in middle.collections if isinstance(each, PathCollection))
    assert fast[:, 0].tolist() == [20, 30]
    assert slow[0, 0] > 30
    assert [label.get_text() for label in middle.get_xticklabels()] == ["20", "30", "never"]
    assert [text.get_text() for text in middle.texts] == ["2 of 2", "0 of 1"]
    assert "90%" in middle.get_xlabel()
    assert "steps" in right.get_xlabel()


def test_the_picture_is_written(runs, tmp_path, capsys):
    png = tmp_path / "out.png"
    printed([*runs, "--png", str(png)], capsys)
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 500)


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("Wilson", "bootstrap", "McNemar", "Holm", "--predictions"))
