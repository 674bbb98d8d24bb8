"""Writes a report of runs: its page and its plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from coconut_ds.analysis.report_page import PagePicture, RunColour, render
from coconut_ds.errors import InputError
from coconut_ds.runs.paths import REPORT_PAGE
from coconut_ds.runs.read_run import RunRecords


def named(runs: Sequence[RunRecords]) -> dict[str, RunRecords]:
    """Runs by their name, or by their folder if names are the same; raises InputError for a folder given twice."""
    folders = Counter(run.folder.resolve() for run in runs)
    twice = [str(folder) for folder, count in folders.items() if count > 1]
    if twice:
        raise InputError(f"{', '.join(twice)}: named more than once; name each run once")
    counts = Counter(run.config.name for run in runs)
    return {run.config.name if counts[run.config.name] == 1 else str(run.folder): run for run in runs}


def write_report(runs: Mapping[str, RunRecords], folder: Path) -> Path:
    """Write `report.html` and a PNG per plot to `folder`, and return the path of the page.

    `runs` by the names they are shown with. A PNG of an earlier report is removed if its plot has no data now. Raises
    InputError for more runs than colours, and for files that cannot be written.
    """
    # Imported here, so that a missing matplotlib is reported in one line.
    from coconut_ds.analysis.plots.canvas import DARK, LIGHT, png
    from coconut_ds.analysis.plots.thought_use import thought_pictures
    from coconut_ds.analysis.plots.training import pictures

    if len(runs) > (most := len(LIGHT.series)):
        raise InputError(
            f"{len(runs)} runs: a report has {most} colours to tell runs apart; name {most} at most, or compare groups "
            "of runs with python -m coconut_ds compare"
        )
    page = folder / REPORT_PAGE
    shown: dict[str, list[PagePicture]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section, drawn in (("thoughts", thought_pictures(runs)), ("curves", pictures(runs))):
            shown[section] = []
            for picture in drawn:
                file = folder / f"{picture.name}.png"
                light, dark = (png(picture.draw(theme)) if picture.draw else None for theme in (LIGHT, DARK))
                shown[section].append(PagePicture(picture.title, picture.caption, light, dark))
                if light is None:
                    file.unlink(missing_ok=True)
                else:
                    file.write_bytes(light)
        colours = [RunColour(LIGHT.look(index)[0], DARK.look(index)[0]) for index in range(len(runs))]
        made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        page.write_text(render(runs, colours, shown, made), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be written: {error.strerror}; name another folder with --out"
        ) from None
    return page
