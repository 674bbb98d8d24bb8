"""Tables of a run report as text: the head, accuracy by stage, configuration, environment, other sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from coconut_ds import strict_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.runs.metrics import skipped_warning, skips_most
from coconut_ds.runs.paths import epoch_of
from coconut_ds.runs.predictions import cut_answers, cut_warning
from coconut_ds.runs.read_run import RunRecords

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Head:
    """Summary of a run for a reader at a glance."""

    name: str
    status: str
    is_finished: bool
    accuracy: str
    """Of the last evaluation."""
    accuracy_count: str
    best: str
    best_epoch: str
    valid_loss: str
    epochs: str
    steps: str
    skipped: str
    """Steps that fp16 skipped; empty for none."""
    time: str
    time_parts: str
    parameters: str
    method: str
    window: str
    model: str
    seed: str


def head(name: str, run: RunRecords) -> Head:
    last, best, config = run.last, run.best, run.config
    times = _seconds(run)
    return Head(
        name=name,
        status="finished" if run.is_finished else "not finished",
        is_finished=run.is_finished,
        accuracy=f"{last.accuracy:.1%}" if last else NOTHING,
        accuracy_count=f"{last.n_correct:,} of {last.n_total:,}" if last else "no evaluation yet",
        best=f"{best.accuracy:.1%}" if best else NOTHING,
        best_epoch=f"epoch {best.epoch}, stage {best.stage}" if best else "no evaluation yet",
        valid_loss=f"{last.valid_loss:.4f}" if last else NOTHING,
        epochs=f"{run.epochs_done} of {config.num_epochs}",
        steps=f"{run.steps_done:,}",
        skipped=f"{run.n_skipped:,} skipped by fp16" if run.n_skipped else "",
        time=duration(sum(times.values())) if run.metrics.steps else NOTHING,
        time_parts=", ".join(f"{part} {duration(seconds)}" for part, seconds in times.items() if seconds),
        parameters=NOTHING if run.n_parameters is None else magnitude(run.n_parameters),
        method=config.method,
        window=_window(run),
        model=_model(config),
        seed=str(config.seed),
    )


def verdict(runs: Sequence[RunRecords]) -> str:
    """The outcome of one run or several, in one sentence."""
    if len(runs) == 1:
        return _verdict(runs[0])
    n_finished = sum(run.is_finished for run in runs)
    ended = "all finished" if n_finished == len(runs) else f"{n_finished} of {len(runs)} finished"
    shares = [run.last.accuracy for run in runs if run.last]
    if not shares:
        return f"No evaluation yet; {ended}."
    return f"Last accuracies from {min(shares):.1%} to {max(shares):.1%}; {ended}."


def _verdict(run: RunRecords) -> str:
    last, best = run.last, run.best
    if last is None or best is None:
        steps = run.steps_done
        begun = f"{steps:,} optimizer step{'s' * (steps > 1)} so far" if steps else "No optimizer step is recorded"
        return f"{begun}, and no evaluation: the first one comes at the end of the first epoch."
    correct = f"{last.accuracy:.1%} of {last.n_total:,} validation questions were answered correctly"
    sentence = f"After epoch {last.epoch}, {correct}"
    if best.accuracy > last.accuracy:
        # A stage with visible steps is easier, so a better accuracy there does not mean that it fell since.
        where = f"epoch {best.epoch}" if best.stage == last.stage else f"epoch {best.epoch}, in stage {best.stage}"
        return f"{sentence}; {best.accuracy:.1%} at best, after {where}."
    return f"{sentence}, the best so far." if not run.is_finished else f"{sentence}, the best of the run."


def _seconds(run: RunRecords) -> dict[str, float]:
    """Seconds by activity; steps that were not recorded count with the mean of the recorded ones."""
    steps = [step.step_time_s for step in run.metrics.steps]
    return {
        "steps": sum(steps) / len(steps) * run.steps_done if steps else 0.0,
        "answers": sum(each.n_total / each.examples_per_s for each in run.metrics.evaluations),
        "checkpoints": sum(each.seconds for each in run.metrics.checkpoints),
    }


def _window(run: RunRecords) -> str:
    config = run.config
    if config.traits.thoughts != "continuous":
        return "no continuous thoughts"
    context = config.latent_context
    then = [f"projected through {config.latent_projection}"] if config.latent_projection else []
    then += [f"scaled to the norm {config.latent_norm}"] if config.latent_norm != "none" else []
    if context is None:
        return "; ".join(["none, the last state alone", *then])
    weights = context.newest_first
    learned = run.last.latent_weights if run.last else ()
    kind = f"learned, from {_shares(weights)}" if context.learned else _shares(weights)
    now = f", now {_shares(learned)}" if learned else ""
    return "; ".join([f"{kind}{now}; {context.scope}", *then])


def _shares(weights: Sequence[float]) -> str:
    total = sum(weights)
    return " ".join(f"{weight / total:.3g}" for weight in weights)


def _model(config: RunConfig) -> str:
    if config.model is None:
        return config.model_id
    return f"{config.model.architecture} from scratch, {config.model.n_layer} layers of {config.model.n_embd}"


def duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def magnitude(count: int) -> str:
    """`44,100`, `0.44 M`, `124 M` or `1.3 B`."""
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


@dataclass(frozen=True)
class StageRow:
    """Accuracy in one stage of a run."""

    stage: int
    n_thoughts: str
    epochs: str
    last: str
    best: str
    tokens: str
    cut: str
    """Answers of its last evaluation that reached `max_new_tokens`."""


def stage_rows(run: RunRecords) -> list[StageRow]:
    """A row per evaluated stage."""
    thoughts = {start.stage: str(start.n_thoughts) for start in run.metrics.stages}
    rows = []
    for stage, group in groupby(run.metrics.evaluations, key=lambda each: each.stage):
        mine = list(group)
        first, last = mine[0].epoch, mine[-1].epoch
        rows.append(
            StageRow(
                stage,
                thoughts.get(stage, NOTHING),
                str(first) if first == last else f"{first} to {last}",
                f"{mine[-1].accuracy:.1%}",
                f"{max(each.accuracy for each in mine):.1%}",
                f"{mine[-1].mean_new_tokens:.1f}",
                NOTHING if mine[-1].n_cut is None else f"{mine[-1].n_cut:,}",
            )
        )
    return rows


def other_sets(run: RunRecords) -> list[tuple[str, str, str, str]]:
    """Name, accuracy, numbers of questions and of cut answers of each other set that was evaluated."""
    rows = []
    for name, answers in run.predictions.items():
        if epoch_of(name) is None:
            share = sum(answer.correct for answer in answers) / len(answers)
            cut = cut_answers(answers)
            rows.append((name, f"{share:.1%}", f"{len(answers):,}", f"{cut.count:,}" if cut else NOTHING))
    return rows


def warnings(runs: Mapping[str, RunRecords]) -> list[str]:
    """Caveats of the numbers, one sentence each."""
    return [f"{name}: {text}." for name, run in runs.items() for text in _warnings(run)]


def _warnings(run: RunRecords) -> list[str]:
    found = []
    if skips_most(run.n_skipped, run.steps_done):
        found.append(skipped_warning(run.n_skipped, run.steps_done))
    last = run.last
    if last and last.n_cut:
        found.append(f"epoch {last.epoch}: {cut_warning(last.n_cut, last.n_total, run.config.max_new_tokens)}")
    for name, answers in run.predictions.items():
        cut = cut_answers(answers)
        # Cut answers of the last epoch are counted in the last evaluation.
        if epoch_of(name) is None and cut and cut.count:
            found.append(f"{name}: {cut_warning(cut.count, len(answers), max(cut.limits))}")
    return found


@dataclass(frozen=True)
class Setting:
    """A key and its value in each run."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """A table of settings: `first` is shown under `title`, `rest` is folded away."""

    title: str
    first_title: str
    first: list[Setting]
    rest_title: str
    rest: list[Setting]


def configuration(runs: Mapping[str, RunRecords]) -> Settings:
    """Differences between runs come first; for one run, keys that are not at their default."""
    dumped = [_flat(run.config.model_dump(mode="json")) for run in runs.values()]
    if len(dumped) > 1:
        return _compared("Configuration", dumped)
    defaults = _flat(RunConfig().model_dump(mode="json"))
    changed = [key for key, value in dumped[0].items() if defaults.get(key) != value]
    return _divided("Configuration", dumped, changed, "Set for this run", "Left at its default")


def environments(runs: Mapping[str, RunRecords]) -> Settings:
    """Differences between runs come first; for one run, everything."""
    flat = [_flat(run.environment) for run in runs.values()]
    if len(flat) > 1:
        return _compared("Environment", flat)
    return _divided("Environment", flat, list(flat[0]), "Recorded when the run started", "")


def _compared(title: str, flat: list[dict[str, str]]) -> Settings:
    keys = dict.fromkeys(key for each in flat for key in each)
    differing = [key for key in keys if len({each.get(key) for each in flat}) > 1]
    return _divided(title, flat, differing, "Differs between the runs", "The same in all runs")


def _divided(title: str, flat: list[dict[str, str]], first: list[str], first_title: str, rest_title: str) -> Settings:
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [Setting(key, tuple(each.get(key, NOTHING) for each in flat)) for key in keys]
    return Settings(
        title,
        first_title,
        [row for row in rows if row.key in first],
        rest_title,
        [row for row in rows if row.key not in first],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys of nested sections, with their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else strict_json.dumps(value, ensure_ascii=False)
    return flat
