"""The pictures of a report: what is drawn where, and why nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import recorded

from coconut_ds.analysis.plots.canvas import DARK, LIGHT, png
from coconut_ds.analysis.plots.curves import averaged, stage_starts
from coconut_ds.analysis.plots.training import pictures
from coconut_ds.runs.read_run import read_run


def picture(name: str, runs):
    return next(each for each in pictures(runs) if each.name == name)


def axes_of(name: str, runs, theme=LIGHT):
    return picture(name, runs).draw(theme).axes[0]


@pytest.fixture
def runs(tmp_path):
    """One run of three epochs, another that has come as far as the second."""
    folders = [recorded.write_run(tmp_path, "a"), recorded.write_run(tmp_path, "b", epochs=2, finished=False)]
    return {folder.name: read_run(folder) for folder in folders}


def curves(axes, colour: str):
    """x and y of the lines of a colour; marks of stages, which are as high as the axes, left out."""
    lines = [line for line in axes.lines if line.get_color() == colour and len(line.get_xdata())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines if list(line.get_ydata()) != [0, 1]]


def test_a_block_of_steps_is_its_mean_with_its_lowest_and_highest():
    curve = averaged([2, 4, 6, 8, 10], [1.0, 3.0, 5.0, 5.0, 9.0], [1.0, 1.0, 2.0, 2.0, 5.0], size=2)
    assert curve.steps.tolist() == [3, 7, 10]
    assert curve.means.tolist() == [2, 5, 9]
    assert curve.lows.tolist() == [1, 5, 9]
    assert curve.highs.tolist() == [3, 5, 9]


def test_the_loss_is_drawn_stage_by_stage_with_the_validation_losses(runs):
    axes = axes_of("loss", {"a": runs["a"]})
    *stages, validation = curves(axes, LIGHT.series[0])
    assert stages == [
        (list(range(first, first + 4)), [4 / step for step in range(first, first + 4)]) for first in (1, 5, 9)
    ]
    assert validation == ([4, 8, 12], [1, 1 / 2, 1 / 3])


def test_a_long_run_is_averaged_and_says_so(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    recorded.write_events(folder, [recorded.train_step(1, step, loss=step % 2 + 1.0) for step in range(1, 241)])
    run = {"a": read_run(folder)}
    ((steps, losses),) = curves(axes_of("loss", run), LIGHT.series[0])[:1]
    assert (len(steps), steps[0], set(losses)) == (120, 1.5, {1.5})
    assert "means of 2 recorded steps, in a band from the lowest to the highest" in picture("loss", run).caption
    (band,) = axes_of("loss", run).collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1, 2)


def test_the_loss_has_a_log_scale_only_where_it_falls_far(tmp_path, runs):
    assert axes_of("loss", runs).get_yscale() == "linear"
    folder = recorded.write_run(tmp_path, "far", epochs=0)
    recorded.write_events(folder, [recorded.train_step(1, step, loss=10.0**-step) for step in range(1, 5)])
    axes = axes_of("loss", {"far": read_run(folder)})
    assert axes.get_yscale() == "log"
    assert "log" in axes.get_ylabel()


def test_losses_that_are_no_numbers_or_zero_do_not_stop_a_picture(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    events = [recorded.train_step(1, 1, loss=0.0), recorded.evaluation(1, valid_loss=float("nan"))]
    recorded.write_events(folder, events)
    assert png(picture("loss", {"a": read_run(folder)}).draw(LIGHT)).startswith(b"\x89PNG")


def test_stages_are_marked_once_and_labelled(tmp_path, runs):
    axes = axes_of("accuracy", {"a": runs["a"]})
    assert [text.get_text() for text in axes.texts] == ["stage", "0", "1", "2"]
    assert [text.get_position()[0] for text in axes.texts[1:]] == [0, 4, 8]
    folder = recorded.write_run(tmp_path, "reset", epochs=0)
    mark = {"event": "stage", "n_thoughts": 0, "switch_time_s": 0.1, "optimizer_reset": True}
    places = [(1, 0, 0), (2, 0, 4), (3, 1, 8)]
    recorded.write_events(folder, [mark | {"epoch": e, "stage": stage, "step": step} for e, stage, step in places])
    # The second one is a reset of the optimizer within stage 0.
    assert stage_starts(read_run(folder)) == [(0, 0), (8, 1)]


def test_stages_that_begin_elsewhere_have_the_colour_of_their_run(tmp_path, runs):
    assert picture("accuracy", runs).caption.endswith("Vertical lines: a new stage.")
    folder = recorded.write_run(tmp_path, "other", epochs=0)
    events = recorded.training(2)
    recorded.write_events(folder, [event | {"step": event["step"] + 1} for event in events if event["event"] != "end"])
    both = {"a": runs["a"], "other": read_run(folder)}
    assert picture("accuracy", both).caption.endswith("a new stage of the run of that colour.")
    axes = axes_of("accuracy", both)
    marks = [(line.get_xdata()[0], line.get_color()) for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [(at, LIGHT.series[0]) for at in (0, 4, 8)] + [(at, LIGHT.series[1]) for at in (1, 5)]
    assert not axes.texts


def test_several_runs_lie_over_each_other_in_their_colours(runs):
    axes = axes_of("accuracy", runs)
    assert curves(axes, LIGHT.series[0]) == [([4, 8, 12], pytest.approx([50, 75, 100 - 50 / 3]))]
    assert curves(axes, LIGHT.series[1]) == [([4, 8], pytest.approx([50, 75]))]
    rings = [each.get_offsets()[0].tolist() for each in axes.collections]
    assert rings == [pytest.approx([12, 100 - 50 / 3]), pytest.approx([8, 75])]
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names == ["a", "b"]
    assert axes.get_ylim() == (40, 101)


def test_runs_are_told_apart_by_the_marks_of_their_evaluations_too(runs):
    axes = axes_of("accuracy", runs)
    drawn = [line.get_marker() for line in axes.lines if line.get_color() in LIGHT.series[:2]]
    named = [handle.get_marker() for handle in axes.figure.legends[0].legend_handles]
    assert drawn == named == ["o", "s"]


def test_a_long_name_keeps_its_end(runs):
    (name, _) = (
        axes_of("accuracy", {"prosqa_contextual_embedding_norm_seed12": runs["a"], "b": runs["b"]})
        .figure.legends[0]
        .get_texts()
    )
    assert name.get_text().startswith("prosqa_")
    assert name.get_text().endswith("_seed12")
    assert "…" in name.get_text()


def test_bars_stand_for_the_last_evaluation_by_number_of_steps(runs):
    axes = axes_of("accuracy_by_steps", runs)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([90, 70, 90, 70])
    # Six questions in both, of two and three steps in turn.
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2\nn = 3", "3\nn = 3"]
    assert axes.texts[0].get_text() == "90.0"


def test_numbers_of_steps_are_in_order_and_uncounted_where_runs_answered_others(tmp_path, runs):
    folder = recorded.write_run(tmp_path, "c", epochs=1)
    shares = {"10": 0.1, "9": 0.2, "2": 0.3}
    recorded.write_events(folder, [recorded.evaluation(1, accuracy_by_steps=shares)])
    recorded.write_predictions(folder, "epoch_0001", [recorded.prediction(0, True)])
    axes = axes_of("accuracy_by_steps", {"a": runs["a"], "c": read_run(folder)})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "3", "9", "10"]


@pytest.mark.parametrize(("name", "value"), [("throughput", 200), ("memory", 1.5), ("padding", 25)])
def test_values_of_steps(name, value, runs):
    axes = axes_of(name, runs)
    drawn = curves(axes, LIGHT.series[0])
    assert np.ravel([y for _, y in drawn]).tolist() == [value] * 12
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > value


def test_each_loss_of_supervision_that_is_recorded_has_a_plot(tmp_path, runs):
    assert not {"step_loss", "verbal_loss", "distance"} & {each.name for each in pictures(runs)}
    folder = recorded.write_run(tmp_path, "taught", epochs=0)
    recorded.write_events(folder, [recorded.train_step(1, 1, verbal_loss=0.5, distance=0.25)])
    both = runs | {"taught": read_run(folder)}
    assert not any(each.name == "step_loss" for each in pictures(both))
    for name, value in (("verbal_loss", 0.5), ("distance", 0.25)):
        axes = axes_of(name, both)
        drawn = [line for line in axes.lines if list(line.get_ydata()) == [value]]
        assert [line.get_color() for line in drawn] == [LIGHT.series[len(runs)]]
        assert "Not in the records of a" in picture(name, both).caption


def test_a_slow_step_counts_in_the_tokens_per_second_for_as_long_as_it_took(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0)
    steps = [recorded.train_step(1, step, step_time_s=0.5 if step % 2 else 4.5) for step in range(1, 241)]
    recorded.write_events(folder, steps)
    run = {"a": read_run(folder)}
    ((_, rates),) = curves(axes_of("throughput", run), LIGHT.series[0])
    # 200 tokens in 5 seconds; the mean of 200 and 22.2 tokens a second would be 111.
    assert rates == pytest.approx([40] * 120)
    (band,) = axes_of("throughput", run).collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((100 / 4.5, 200))
    assert picture("throughput", run).caption == (
        "Tokens of a step over all ranks, without padding; all tokens of 2 recorded steps over all their seconds, in a "
        "band from the lowest to the highest."
    )


def test_what_a_record_lacks_is_said_and_left_empty(tmp_path, runs):
    folder = recorded.write_run(tmp_path, "old", epochs=0)
    recorded.write_events(folder, [recorded.train_step(1, 1, n_tokens=None, padding_share=None, peak_memory_gib=None)])
    old = {"old": read_run(folder)}
    for name in ("throughput", "memory", "padding"):
        assert picture(name, old).draw is None
        assert picture(name, old).caption == "Not in the records: they were written by an earlier version."
    assert picture("padding", old | {"a": runs["a"]}).caption.endswith("Not in the records of old.")


def test_a_run_that_has_only_begun_has_empty_pictures_that_say_why(tmp_path):
    run = {"new": read_run(recorded.write_run(tmp_path, epochs=0, finished=False))}
    said = {each.name: each.caption for each in pictures(run) if each.draw is None}
    assert set(said) == {"loss", "accuracy", "accuracy_by_steps", "throughput", "memory", "padding"}
    assert said["loss"] == "No optimizer step has been recorded yet."
    assert said["accuracy"] == "No evaluation yet: the first one comes at the end of the first epoch."


def test_a_dark_picture_has_dark_ground_and_its_own_colours(runs):
    axes = axes_of("accuracy", runs, DARK)
    assert axes.lines[-1].get_color() == DARK.series[1]
    assert axes.figure.get_facecolor()[:3] == pytest.approx((0x17 / 255, 0x1B / 255, 0x21 / 255))
