"""Compare runs by their answers.

    python -m coconut_ds compare [LABEL=]RUN [[LABEL=]RUN ...] [--predictions NAME] [--solved SHARE]
                                 [--json FILE] [--csv FOLDER] [--png FILE]

RUN is a run folder. Runs with the same label are a group: the seeds of one method. Without a label the group is the
run's name without its seed: `demo_seed1`, `demo-seed1` and `demo_s1` with seed 1 belong to `demo`. All runs must have
answered the same questions. Meaning and assumptions of the numbers:

accuracy     Share of right answers; of a group, the mean over its seeds.
Wilson       95% score interval of one run: what this trained model would reach on more questions drawn like these. It
             ignores the spread over seeds.
bootstrap    95% percentile interval of a group, 10,000 draws of seeds and, crossed with them, of questions: what the
             method would reach with other seeds on other questions, assuming that both are independent draws. With few
             seeds it is coarse and too narrow: if their spread dominates and is normal, it covers about 50% with 2
             seeds, 75% with 3, 83% with 5, 89% with 10. With one seed only questions are drawn.
difference   Mean accuracy of one group minus that of another in percentage points, with the same bootstrap: a draw
             takes the same questions for both groups, and seeds of each. Too narrow also if few answers differ.
McNemar      Exact test of two models of the same seed, on the questions that only one of them answered right. It tests
             whether these two trained models differ on questions like these, not whether the methods do.
p, Holm      The same p-values, adjusted for the number of tests printed.
tokens       Mean thoughts plus generated tokens per question, before the end of the answer; then thoughts alone.
solved       With --solved 0.95: seeds of a group that answer at least 95% right, and optimizer steps to the first
             evaluation without visible steps that has 95% of the validation set right. "steps, p": Mann-Whitney
             test of two groups, never being later than any, exact up to 8 seeds each; "seeds, p": Fisher's exact test
             of solved seeds, which cannot be below 0.0079 with 5 seeds each. Holm's adjustment is over all pairs.
cut          Answers that reached `max_new_tokens` before their end; the column appears only if there are any.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coconut_ds.analysis.comparison import compare, grouped, read_run
from coconut_ds.analysis.comparison_tables import report, write_csv
from coconut_ds.analysis.solved import solved
from coconut_ds.commands.command_line import PROG, new_parser, run_command, write_json, write_output
from coconut_ds.errors import InputError, demand_libraries


def main(arguments: list[str] | None = None, prog: str = f"{PROG} compare") -> int:
    """0 if the comparison was printed; other statuses as `run_command` says."""
    parser = new_parser(prog, __doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="run folder, save_path/name")
    parser.add_argument(
        "--predictions",
        metavar="NAME",
        help="file of predictions/ to compare, such as eval_prosqa_test (default: each run's last epoch); an eval_ "
        "file does not name its checkpoint",
    )
    parser.add_argument("--solved", type=float, metavar="SHARE", help="accuracy, from 0 to 1, that a seed has to reach")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, shares from 0 to 1")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help="write each table as FOLDER/NAME.csv")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw accuracies; needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="print the tables as GitHub markdown")
    return run_command(_compare, parser, arguments)


def _compare(options: argparse.Namespace) -> None:
    demand_libraries(["scipy", "matplotlib"] if options.png else ["scipy"], extra="report")
    if options.solved is not None and not 0 < options.solved <= 1:
        raise InputError(f"--solved {options.solved}: must be above 0 and at most 1, such as 0.95")
    groups = grouped([read_run(text, options.predictions) for text in options.runs])
    comparison = compare(groups)
    if options.solved is not None:
        comparison["solved"] = solved(groups, options.solved)
    if options.json:
        write_json(options.json, comparison)
    if options.csv:
        write_output(options.csv, lambda folder: write_csv(comparison, folder))
    if options.png:
        from coconut_ds.analysis.plots.canvas import save
        from coconut_ds.analysis.plots.comparison import draw

        write_output(options.png, lambda path: save(draw(comparison), path))
    print(report(comparison, options.markdown))
