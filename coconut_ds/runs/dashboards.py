"""A run on wandb and in TensorBoard: curves over optimizer steps, stages, predictions, configuration, summary.

The only importer of both. Whatever goes wrong here is raised; `tracker.py` makes sure that the run continues.

A dashboard starts when it is made; `earlier` are the events before a resumption, oldest first. `log` draws an event of
`metrics.jsonl` at its `step`, `predictions` shows those of an evaluation; steps are optimizer steps, epochs count from
1. `finish` shows the summary, in which `complete` says whether the run reached its end; nothing is drawn after it.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coconut_ds import strict_json
from coconut_ds.config.run_config import RunConfig
from coconut_ds.errors import InputError, demand_libraries
from coconut_ds.runs.paths import RunFolder

_WANDB_WAIT_S = 20
_WANDB_UPLOAD_S = 300
_TENSORBOARD_FLUSH_S = 10
_MOST_ROWS = 100
_COLUMNS = ("index", "question", "expected", "given", "correct", "n_steps", "n_thoughts", "n_new_tokens", "cut", "text")
_STAGE_CURVES = "loss_by_stage"

Events = Sequence[Mapping[str, Any]]


def dashboards_of(config: RunConfig) -> list[type[Dashboard]]:
    """The dashboards a run asks for; none in debug mode."""
    asked: dict[type[Dashboard], bool] = {Wandb: config.wandb != "disabled", Tensorboard: config.tensorboard}
    return [dashboard for dashboard, is_asked in asked.items() if is_asked and not config.debug]


def demand_libraries_of(config: RunConfig) -> None:
    """Raises InputError if the run asks for TensorBoard and it is not installed; wandb always is."""
    if Tensorboard in dashboards_of(config):
        try:
            demand_libraries(["tensorboard"], extra="tensorboard")
        except InputError as error:
            raise InputError(f"tensorboard: true, but {error}, or set it to false") from None


def forget_earlier_run(folder: RunFolder) -> None:
    """For a run that starts anew: remove what would tie its curves to those of an earlier run of the same name."""
    folder.wandb_id.unlink(missing_ok=True)
    for left in folder.tensorboard.glob("events.out.tfevents.*"):
        left.unlink()


class Wandb:
    """A wandb run, whose id stays in the run folder so that a resumed run continues it, offline too.

    wandb counts its own steps and cannot go back, so every curve has the curve `step` as its x axis: steps that are
    done again after a crash are drawn over the ones that they repeat.
    """

    def __init__(self, config: RunConfig, earlier: Events):
        import wandb

        # Before anything else: only then do the login and a failing start print nothing.
        wandb.setup(wandb.Settings(silent=True))
        if config.wandb == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no login found (`wandb login`, or WANDB_API_KEY)")
        id_file = RunFolder(config.run_folder).wandb_id
        self._run = wandb.init(
            project=config.project,
            name=config.name,
            id=id_file.read_text(encoding="utf-8") if id_file.exists() else None,
            resume="allow",
            dir=str(config.run_folder),
            mode=config.wandb,
            config=config.model_dump(mode="json"),
            # With its `console` on wandb takes hold of the streams that `terminal.py` has diverted.
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_WANDB_WAIT_S,
                # Without these a run waits at its end for as long as the network is away.
                finish_timeout=_WANDB_UPLOAD_S,
                finish_timeout_raises=True,
            ),
        )
        id_file.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._evaluations = [event for event in earlier if event["event"] == "eval"]

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        curves: dict[str, Any] = _curves(event, values)
        if event == "eval":
            self._evaluations.append(values)
            curves["accuracy_by_stage"] = self._accuracy_by_stage()
        if curves:
            self._run.log({"step": values["step"], **curves})

    def predictions(self, step: int, epoch: int, stage: int, rows: Events) -> None:
        import wandb

        table = wandb.Table(columns=["epoch", "stage", *_COLUMNS, "thoughts"])
        for cells in _table(rows):
            table.add_data(epoch, stage, *cells)
        self._run.log({"step": step, "predictions": table})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        # A run that was stopped or failed does not look finished until it has been resumed to its end.
        self._run.finish(exit_code=0 if summary["complete"] else 1)

    def _accuracy_by_stage(self) -> Any:
        """A chart with a line for every stage, in which one sees where a stage begins; curves cannot be marked."""
        from wandb.plot import line_series

        lines = defaultdict(list)
        for evaluation in self._evaluations:
            lines[f"stage {evaluation['stage']}"].append((evaluation["step"], evaluation["accuracy"]))
        steps = [[step for step, _ in line] for line in lines.values()]
        accuracies = [[accuracy for _, accuracy in line] for line in lines.values()]
        return line_series(steps, accuracies, list(lines), title="accuracy by stage", xname="step", split_table=True)


class Tensorboard:
    """Event files in `tensorboard/` of the run folder; steps that are done again after a crash replace the old ones."""

    def __init__(self, config: RunConfig, earlier: Events):
        from torch.utils.tensorboard import SummaryWriter

        self._config = config
        self._step = max((event["step"] for event in earlier), default=0)
        self._writer = SummaryWriter(
            str(RunFolder(config.run_folder).tensorboard),
            purge_step=self._step + 1 if earlier else None,
            flush_secs=_TENSORBOARD_FLUSH_S,
        )
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```", self._step)
        # One chart of all stages' losses, on the page CUSTOM SCALARS.
        self._writer.add_custom_scalars({"stages": {"loss by stage": ["Multiline", [f"{_STAGE_CURVES}/.*"]]}})

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        self._step = values["step"]
        for name, value in _curves(event, values).items():
            self._writer.add_scalar(name, value, self._step)
        if event == "stage":
            self._writer.add_text("stage", f"Stage {values['stage']} begins with epoch {values['epoch']}.", self._step)
        if event in ("eval", "checkpoint"):
            self._writer.flush()

    def predictions(self, step: int, epoch: int, stage: int, rows: Events) -> None:
        header = [*_COLUMNS, "thoughts"]
        lines = [header, ["---"] * len(header), *([_markdown(cell) for cell in cells] for cells in _table(rows))]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._writer.add_text("predictions", f"Epoch {epoch}, stage {stage}\n\n{table}", step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        settings = {
            key: value if isinstance(value, bool | int | float | str) else strict_json.dumps(value)
            for key, value in self._config.model_dump(mode="json").items()
        }
        figures = {f"summary/{name}": value for name, value in summary.items()}
        # They go to a file of their own, and a reader who has opened that one does not look at the first again.
        self._writer.flush()
        # `run_name` is a folder within; without one there would be another run, without curves.
        self._writer.add_hparams(settings, figures, run_name=".", global_step=self._step)
        self._writer.close()


Dashboard = Wandb | Tensorboard


def _curves(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """An event's numbers by name of their curve; `end` has none, its figures are in the summary."""
    if event == "end":
        return {}
    section = "train" if event == "train_step" else event
    curves: dict[str, float] = {}
    for key, value in values.items():
        if key != "step":
            curves |= _numbers(key if key in ("epoch", "stage") else f"{section}/{key}", value)
    if event == "train_step":
        curves[f"{_STAGE_CURVES}/stage_{values['stage']}"] = values["loss"]
    return curves


def _numbers(name: str, value: Any) -> dict[str, float]:
    """The numbers in a value; those in lists, counted from 1, and in dicts have names that begin with `name/`."""
    if isinstance(value, int | float):
        return {name: int(value) if isinstance(value, bool) else value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value, start=1))
    parts = value.items() if isinstance(value, Mapping) else ()
    return {inner: number for key, part in parts for inner, number in _numbers(f"{name}/{key}", part).items()}


def _table(rows: Events) -> Iterator[list[Any]]:
    """Cells of at most `_MOST_ROWS` predictions: wrong answers first, right ones if there is room, in file order.

    Wrong ones beyond that are in the run's `predictions/`, which has every row.
    """
    for row in sorted(rows, key=lambda row: row["correct"])[:_MOST_ROWS]:
        best = (f"{tokens[0][0]} ({tokens[0][1]:.0%})" for tokens in row["thoughts"])
        yield [*(row[column] for column in _COLUMNS), ", ".join(best)]


def _markdown(cell: Any) -> str:
    """A cell of a Markdown table: ProsQA's facts end in the character that would end the cell."""
    return " ".join(html.escape(str(cell)).replace("|", "&#124;").split())
