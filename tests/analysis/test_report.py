"""The command that writes a report, and what its tables say."""

from __future__ import annotations

import struct
import sys

import pytest
import recorded

from coconut_ds.analysis import report_tables
from coconut_ds.analysis.report import named
from coconut_ds.commands import report
from coconut_ds.runs.read_run import read_run

PICTURES = {"loss", "accuracy", "accuracy_by_steps", "throughput", "memory", "padding"}


def refusal(arguments: list[str], capsys) -> str:
    assert report.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_a_report_of_one_run_goes_into_its_folder(tmp_path, capsys):
    folder = recorded.write_run(tmp_path)
    assert report.main([str(folder)]) == 0
    out = folder / "report"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"report: {out / 'report.html'}\n", "")
    assert {path.name for path in out.iterdir()} == {"report.html", *(f"{name}.png" for name in PICTURES)}
    content = (out / "accuracy.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 600)


def test_a_report_of_several_runs_goes_where_it_is_asked_to(tmp_path, capsys):
    runs = [str(recorded.write_run(tmp_path, name)) for name in ("a", "b")]
    assert "2 runs: name a folder for their report with --out FOLDER" in refusal(runs, capsys)
    assert report.main([*runs, "--out", str(tmp_path / "new" / "both")]) == 0
    assert (tmp_path / "new" / "both" / "report.html").is_file()


def test_a_picture_that_has_nothing_to_draw_any_more_does_not_stay(tmp_path):
    folder = recorded.write_run(tmp_path)
    assert report.main([str(folder)]) == 0
    recorded.write_events(folder, [recorded.train_step(1, 1)])
    assert report.main([str(folder)]) == 0
    assert {path.stem for path in (folder / "report").glob("*.png")} == PICTURES - {"accuracy", "accuracy_by_steps"}


def test_what_is_damaged_is_said_and_the_report_is_written(tmp_path, capsys):
    folder = recorded.write_run(tmp_path, n_questions=2)
    (folder / "predictions" / "epoch_0003.jsonl").write_text('{"index": 0, "quest')
    assert report.main([str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"left out: {folder / 'predictions' / 'epoch_0003.jsonl'}, line 1: Invalid JSON")
    page = (folder / "report" / "report.html").read_text()
    assert "Left out of this report" in page
    assert "No predictions to show" in page


def test_runs_of_one_name_go_by_their_folder_and_none_is_taken_twice(tmp_path, capsys):
    first, second = (recorded.write_run(tmp_path / each, "same") for each in ("x", "y"))
    other = recorded.write_run(tmp_path, "other")
    assert list(named([read_run(each) for each in (first, other, second)])) == [str(first), "other", str(second)]
    assert "named more than once" in refusal([str(first), f"{first}/../same", "--out", str(tmp_path)], capsys)


def test_more_runs_than_there_are_colours_are_refused(tmp_path, capsys):
    runs = [str(recorded.write_run(tmp_path, f"run{number}", epochs=1)) for number in range(8)]
    error = refusal([*runs, "--out", str(tmp_path / "out")], capsys)
    assert error == (
        "error: 8 runs: a report has 7 colours to tell runs apart; name 7 at most, or compare groups of runs with "
        "python -m coconut_ds compare\n"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_line(tmp_path, capsys, monkeypatch):
    assert "missing is not a run folder, it has no run_config.yaml" in refusal([str(tmp_path / "missing")], capsys)
    folder = recorded.write_run(tmp_path)
    (tmp_path / "file").write_text("")
    error = refusal([str(folder), "--out", str(tmp_path / "file")], capsys)
    assert f"{tmp_path / 'file'} cannot be written: File exists; name another folder with --out" in error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refusal([str(folder)], capsys) == "error: matplotlib missing: pip install 'coconut_ds[report]'\n"


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    assert "RUN/report" in capsys.readouterr().out


def head_of(folder):
    return report_tables.head("a", read_run(folder))


def test_the_head_of_a_finished_run(tmp_path):
    window = {"weights": [6, 3, 1], "scope": "sequence"}
    head = head_of(recorded.write_run(tmp_path, epochs=3, latent_context=window, seed=4))
    assert (head.status, head.epochs, head.steps, head.seed) == ("finished", "3 of 3", "12", "4")
    assert (head.accuracy, head.accuracy_count, head.best, head.best_epoch) == (
        "83.3%",
        "90 of 100",
        "83.3%",
        "epoch 3, stage 2",
    )
    # 12 steps of 0.5 s, 3 evaluations of 100 questions at 50 a second, 3 checkpoints of 0.5 s.
    assert (head.time, head.time_parts) == ("14 s", "steps 6.0 s, answers 6.0 s, checkpoints 1.5 s")
    assert (head.method, head.window, head.model) == ("coconut", "0.6 0.3 0.1; sequence", "openai-community/gpt2")


def test_the_head_of_a_run_without_an_evaluation(tmp_path):
    head = head_of(recorded.write_run(tmp_path, epochs=0, finished=False, method="cot", num_epochs=9))
    assert (head.status, head.epochs, head.steps) == ("not finished", "0 of 9", "0")
    assert (head.accuracy, head.accuracy_count, head.best) == (report_tables.NOTHING, "no evaluation yet", "\u2013")
    assert (head.window, head.time) == ("no continuous thoughts", "\u2013")


def test_steps_left_out_of_the_records_count_in_the_time(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0, log_every_steps=5)
    recorded.write_events(folder, [recorded.train_step(1, step, step_time_s=2.0) for step in (5, 10)])
    assert head_of(folder).time == "20 s"
    # Two more steps were taken before the evaluation, which are not among the recorded ones.
    recorded.write_events(folder, [recorded.train_step(1, 10, step_time_s=2.0), recorded.evaluation(1, step=12)])
    assert (head_of(folder).steps, head_of(folder).time_parts) == ("12", "steps 24 s, answers 2.0 s")


@pytest.mark.parametrize(
    ("context", "learned", "text"),
    [
        (None, None, "none, the last state alone"),
        ({"weights": "uniform", "window": 3, "scope": "last_pass"}, None, "0.333 0.333 0.333; last_pass"),
        ({"weights": [0.6, 0.4], "learned": True}, [0.7, 0.3], "learned, from 0.6 0.4, now 0.7 0.3; sequence"),
    ],
)
def test_a_window_in_words(context, learned, text, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1, latent_context=context)
    if learned:
        recorded.write_events(folder, [recorded.evaluation(1, latent_weights=learned)])
    assert head_of(folder).window == text


def test_what_else_is_done_with_a_thought(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1, latent_projection=8, latent_norm="rms")
    assert head_of(folder).window == "none, the last state alone; projected through 8; scaled to the norm rms"


@pytest.mark.parametrize(
    ("shares", "finished", "sentence"),
    [
        ([0.5, 0.9], True, "After epoch 2, 90.0% of 100 {}, the best of the run."),
        ([0.5, 0.9], False, "After epoch 2, 90.0% of 100 {}, the best so far."),
        ([0.9, 0.5], True, "After epoch 2, 50.0% of 100 {}; 90.0% at best, after epoch 1, in stage 0."),
        (
            [],
            False,
            "No optimizer step is recorded, and no evaluation: the first one comes at the end of the first epoch.",
        ),
    ],
)
def test_the_verdict_on_a_run(shares, finished, sentence, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0, num_epochs=2)
    events = [recorded.evaluation(epoch, accuracy=share) for epoch, share in enumerate(shares, start=1)]
    end = [{"event": "end", "epochs": 2, "step": 8}] if finished else []
    recorded.write_events(folder, [*events, *end])
    answered = "validation questions were answered correctly"
    assert report_tables.verdict([read_run(folder)]) == sentence.format(answered)


@pytest.mark.parametrize(("steps", "begun"), [(1, "1 optimizer step so far"), (2, "2 optimizer steps so far")])
def test_the_verdict_on_a_run_that_has_taken_its_first_steps(steps, begun, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0, finished=False)
    recorded.write_events(folder, [recorded.train_step(1, step) for step in range(1, steps + 1)])
    assert report_tables.verdict([read_run(folder)]).startswith(f"{begun}, and no evaluation: ")


def test_the_verdict_on_several_runs(tmp_path):
    new = read_run(recorded.write_run(tmp_path, "new", epochs=0, finished=False))
    first, second = (read_run(recorded.write_run(tmp_path, str(epochs), epochs=epochs)) for epochs in (2, 5))
    assert report_tables.verdict([first, second]) == "Last accuracies from 75.0% to 90.0%; all finished."
    assert report_tables.verdict([first, new]) == "Last accuracies from 75.0% to 75.0%; 1 of 2 finished."
    assert report_tables.verdict([new, new]) == "No evaluation yet; 0 of 2 finished."


def test_accuracy_by_stage(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    stages = [(1, 0, 0.2), (2, 0, 0.6), (3, 0, 0.5), (4, 1, 0.4)]
    events = [recorded.evaluation(epoch, stage=stage, accuracy=share) for epoch, stage, share in stages]
    recorded.write_events(folder, [*recorded.training(1)[:1], *events])
    first, second = report_tables.stage_rows(read_run(folder))
    assert (first.n_thoughts, first.epochs, first.last, first.best, first.tokens) == (
        "0",
        "1 to 3",
        "50.0%",
        "60.0%",
        "4.0",
    )
    # Its start is not in the records.
    assert (second.n_thoughts, second.epochs, second.last) == (report_tables.NOTHING, "4", "40.0%")


def test_the_settings_of_one_run_begin_with_what_is_not_a_default(tmp_path):
    run = read_run(recorded.write_run(tmp_path, epochs=3, latent_context={"weights": [0.6, 0.4]}))
    settings = report_tables.configuration({"a": run})
    first = {row.key: row.values for row in settings.first}
    assert first["num_epochs"] == ("3",)
    assert first["latent_context.weights"] == ("[0.6, 0.4]",)
    assert "lr" not in first
    assert ("lr", ("0.0001",)) in [(row.key, row.values) for row in settings.rest]


def test_the_settings_of_several_runs_begin_with_what_differs(tmp_path):
    first = read_run(recorded.write_run(tmp_path, "a", lr=0.5))
    second = read_run(recorded.write_run(tmp_path, "b", latent_context={"weights": [0.6, 0.4], "learned": True}))
    runs = {"a": first, "b": second}
    differing = {row.key: row.values for row in report_tables.configuration(runs).first}
    assert differing["lr"] == ("0.5", "0.0001")
    assert differing["latent_context"] == ("null", report_tables.NOTHING)
    assert differing["latent_context.learned"] == (report_tables.NOTHING, "true")
    assert "seed" not in differing
    environment = report_tables.environments(runs)
    assert environment.first == []
    assert [row.key for row in environment.rest] == ["python", "packages.torch", "gpus"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations(seconds, text):
    assert report_tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (44_100, "44,100"), (441_472, "0.441 M"), (124_439_808, "124 M"), (1.5e9, "1.5 B")],
)
def test_numbers_of_parameters(count, text):
    assert report_tables.magnitude(count) == text
