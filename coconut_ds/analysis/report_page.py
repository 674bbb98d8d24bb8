"""The page of a run report: records and plots as one self-contained HTML file.

Records of a run are untrusted text. The template escapes them, and the page's script only sets them as text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coconut_ds import strict_json
from coconut_ds.analysis import report_tables
from coconut_ds.runs.paths import epoch_of
from coconut_ds.runs.predictions import Prediction
from coconut_ds.runs.read_run import RunRecords

ROWS_PER_FILE = 1000
"""Most predictions of one file in a page; wrong ones come first."""


@dataclass(frozen=True)
class PagePicture:
    """A plot as PNGs for light and dark pages; None if there was nothing to draw, which `caption` explains."""

    title: str
    caption: str
    light: bytes | None
    dark: bytes | None


@dataclass(frozen=True)
class RunColour:
    """The colour of a run in pictures and page, as CSS writes it."""

    light: str
    dark: str


def render(
    runs: Mapping[str, RunRecords],
    colours: Sequence[RunColour],
    pictures: Mapping[str, Sequence[PagePicture]],
    made: str,
) -> str:
    """The page of `runs`, by the names they are shown with; `made` is the time of creation, for the footer.

    `pictures` are those of the sections `thoughts`, which is left out without any, and `curves`.
    """
    environment = Environment(
        loader=PackageLoader("coconut_ds", "analysis/report_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_address"] = _data_address
    environment.policies["json.dumps_function"] = strict_json.dumps
    return environment.get_template("page.html.jinja").render(
        heads=[report_tables.head(name, run) for name, run in runs.items()],
        verdict=report_tables.verdict(list(runs.values())),
        colours=colours,
        pictures=pictures,
        stages=[report_tables.stage_rows(run) for run in runs.values()],
        other_sets=[report_tables.other_sets(run) for run in runs.values()],
        settings=[report_tables.configuration(runs), report_tables.environments(runs)],
        examples=_examples(runs),
        warnings=report_tables.warnings(runs),
        problems=[problem for run in runs.values() for problem in run.problems],
        made=made,
    )


def _data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _examples(runs: Mapping[str, RunRecords]) -> dict[str, Any]:
    """Data of the page's script: `rows` with their run and file as indices, and `left_out` as sentences."""
    files = list(dict.fromkeys(file for run in runs.values() for file in run.predictions))
    # Last epochs count as one file, so that the answers of several runs to one question are next to each other.
    order = {file: 0 if epoch_of(file) is not None else 1 + place for place, file in enumerate(files)}
    rows: list[dict[str, Any]] = []
    left_out = []
    for place, (name, run) in enumerate(runs.items()):
        for file, predictions in run.predictions.items():
            kept = chosen(predictions)
            rows += [{"run": place, "file": files.index(file), **_row(prediction)} for prediction in kept]
            if len(kept) < len(predictions):
                left_out.append(f"{name}, {file}: {len(kept):,} of {len(predictions):,}, wrong ones first")
    rows.sort(key=lambda row: (order[files[row["file"]]], row["index"], row["run"]))
    return {"runs": list(runs), "files": files, "rows": rows, "left_out": left_out}


def chosen(predictions: Sequence[Prediction], limit: int = ROWS_PER_FILE) -> list[Prediction]:
    """At most `limit` predictions in order of their index; the first wrong ones are kept before right ones."""
    kept = sorted(predictions, key=lambda each: each.correct)[:limit]
    return sorted(kept, key=lambda each: each.index)


def _row(prediction: Prediction) -> dict[str, Any]:
    row = prediction.model_dump(include={"index", "question", "expected", "given", "correct", "text"})
    lengths = {"steps": prediction.n_steps, "n_thoughts": prediction.n_thoughts, "tokens": prediction.n_new_tokens}
    # Earlier versions did not write `cut`.
    row |= {**lengths, "cut": bool(prediction.cut)}
    return {**row, "thoughts": [[_token(*each) for each in top] for top in prediction.thoughts]}


def _token(text: str, probability: float) -> tuple[str, float]:
    return text, round(probability, 4)
