"""The summary of a run on the terminal: a block at its start; accuracy by stage and the best evaluation at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from coconut_ds.checkpoints.weights import source
from coconut_ds.config.deepspeed_config import ignored_note
from coconut_ds.config.ds_json import read_ds_json
from coconut_ds.config.resolved_run import ResolvedRun
from coconut_ds.config.run_config import RunConfig
from coconut_ds.config.run_file import override
from coconut_ds.data.loaders import steps_per_epoch
from coconut_ds.data.stages import Curriculum
from coconut_ds.inference.evaluator import Evaluation
from coconut_ds.memory.meter import GIB
from coconut_ds.memory.model_states import bucket_note
from coconut_ds.runs.metrics import EpochEvaluation, skipped_text, skipped_warning, skips_most
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.predictions import cut_warning
from coconut_ds.runtime import distributed
from coconut_ds.training.setup import Setup


def opening(run: ResolvedRun, setup: Setup, planned: tuple[int, int] | None, faster: str | None = None) -> str:
    """The block at the start. `planned`: bytes of a rank kept between steps, and added by a forward and backward.

    `faster`: what `memory.faster_file` says.
    """
    config, sizes = run.config, run.sizes
    size = f"{setup.n_parameters / 1e6:.2f} M parameters"
    if config.lora:
        size += f", {setup.n_trained / 1e6:.2f} M of them trained (LoRA of rank {config.lora.r})"
    backbone = setup.backbone.model
    lines = {
        "method": f"{config.method}{_order_text(config)}{_window_text(config)}{_supervision_text(config)}",
        "model": f"{source(config)} ({backbone.config.model_type}), {size}, {run.precision}",
        "devices": f"{sizes.world} x {distributed.device().type}, {config.deepspeed}",
        "data": f"{len(setup.train_set)} training examples, {len(setup.valid_set)} for validation",
        "batch": (
            f"{sizes.total} examples per step = {sizes.micro} per micro-batch x {sizes.accumulation} accumulated x "
            f"{sizes.world} rank{'s' * (sizes.world > 1)}"
        ),
        "stages": _stages_text(config, setup.curriculum, steps_per_epoch(len(setup.train_set), sizes)),
        "memory": _memory_text(planned),
        **({"faster": faster} if faster else {}),
        **({"ignored": note} if (note := ignored_note(read_ds_json(config.deepspeed), config.deepspeed)) else {}),
        **({"buckets": note} if (note := bucket_note(run.ds_config, config.deepspeed)) else {}),
        "folder": f"{config.run_folder} (run.log has what libraries say)",
    }
    return "\n".join([config.name, *(f"  {title:<8}  {text}" for title, text in lines.items())])


def _memory_text(planned: tuple[int, int] | None) -> str:
    if planned is None:
        return "the plan failed, see run.log"
    kept, activations = (n_bytes / GIB for n_bytes in planned)
    where = "per card" if distributed.device().type == "cuda" else "of host memory per rank"
    return f"{kept:.2f} GiB of model states + {activations:.2f} GiB of activations {where}, planned"


def _order_text(config: RunConfig) -> str:
    if config.curriculum == "forward":
        return ""
    return ", last steps replaced first (steps that remain are given in evaluations)"


def _supervision_text(config: RunConfig) -> str:
    texts = []
    if config.step_weight:
        writer = "a copy of the model" if config.has_copied_decoder else "the model"
        texts.append(f", steps written from thoughts by {writer} (weight {config.step_weight:g})")
    if distill := config.distillation:
        texts.append(
            f", taught by itself with steps (alpha {distill.alpha:g}, beta {distill.beta:g}, gamma {distill.gamma:g})"
        )
    mixture = config.mixture
    if mixture.verbal or mixture.direct:
        weights = f"latent {mixture.latent:g}, verbal {mixture.verbal:g}, direct {mixture.direct:g}"
        texts.append(f", mixed with other layouts ({weights})")
    return "".join(texts)


def _window_text(config: RunConfig) -> str:
    context, solver = config.latent_context, config.solver
    then = f", thoughts projected through {config.latent_projection}" if config.latent_projection else ""
    then += f", {solver.iterations} Jacobi iteration{'s' * (solver.iterations > 1)}" if solver else ""
    if context is None:
        return then
    weights = [round(weight, 4) for weight in context.newest_first]
    return f", {'learned ' * context.learned}window {weights} ({context.scope}){then}"


def _stages_text(config: RunConfig, curriculum: Curriculum, steps_per_epoch: int) -> str:
    epochs = range(config.resume, config.num_epochs)
    names = {} if config.traits.steps == "dropped by token" else {config.max_latent_stage + 1: "no step left"}
    texts = []
    for stage, group in groupby(epochs, lambda epoch: _layout(config, curriculum.stage(epoch))):
        first, *later = (epoch + 1 for epoch in group)
        texts.append(f"{names.get(stage, stage)} in {first}" + (f"-{later[-1]}" if later else ""))
    return f"{', '.join(texts)} of {config.num_epochs} epochs, {steps_per_epoch} steps each"


def skip_lines(n_skipped: int, n_steps: int) -> list[str]:
    """How many of a run's optimizer steps fp16 skipped, with a warning if most were; no lines if none was."""
    if not n_skipped:
        return []
    warning = [f"  warning   {skipped_warning(n_skipped, n_steps)}"] if skips_most(n_skipped, n_steps) else []
    return [f"  skipped   {skipped_text(n_skipped, n_steps)} (fp16, gradients overflowed)", *warning]


def finished(folder: RunFolder, n_epochs: int, changed: Sequence[str]) -> str:
    """The message of a run with nothing left to train; `changed` are lines of `run_changes.changes`."""
    said = f"{folder} is finished, {n_epochs} epochs were trained before: nothing was trained now"
    if not changed:
        return f"{said}; raise num_epochs to train further"
    return (
        f"{said}, and the results below are not those of this command. The run was trained with (there -> here):\n"
        f"{bullets(changed)}\n"
        "To train with the settings of this command, set another name=; raise num_epochs to train further"
    )


def changed_text(changed: Sequence[str]) -> str:
    """The message of a run that resumes with other settings or data."""
    return f"changed since the run was last started (before -> now):\n{bullets(changed)}"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)


def closing(
    config: RunConfig,
    folder: RunFolder,
    evaluations: Sequence[EpochEvaluation],
    n_skipped: int = 0,
    n_steps: int = 0,
) -> str:
    """The table of stages, the best evaluations, steps that fp16 skipped, and commands for what comes next."""
    report = f"  report    {shlex.join(['python', '-m', 'coconut_ds.report', str(folder)])}"
    skips = skip_lines(n_skipped, n_steps)
    if not evaluations:
        return "\n".join([*skips, report])

    def layout(row: EpochEvaluation) -> int:
        return _layout(config, row.stage)

    # On ties prefer the later stage, which sees fewer steps.
    best = max(evaluations, key=lambda row: (row.accuracy, layout(row)))
    last_stage = [row for row in evaluations if layout(row) == layout(evaluations[-1])]
    best_of_last = max(last_stage, key=lambda row: row.accuracy)
    lines = [summary_table(evaluations), "", f"  best      {_best_text(best)}"]
    if layout(best) != layout(best_of_last):
        lines.append(f"  last      {_best_text(best_of_last)}, the best of the last stage")
    # Not every run keeps them all.
    checkpoints = [folder.checkpoint(row.epoch) for row in (best_of_last, best, *reversed(evaluations))]
    if kept := [path for path in checkpoints if path.is_dir()]:
        test_set = [override("test_path", config.test_path)] if config.test_path else []
        lines.append(f"  evaluate  {shlex.join([*evaluate_command(), str(kept[0]), *test_set])}")
    last = evaluations[-1]
    if last.n_cut:
        lines.append(f"  warning   {cut_warning(last.n_cut, last.n_total, config.max_new_tokens)}")
    return "\n".join([*lines, *skips, report])


def evaluate_command() -> list[str]:
    """The words that evaluate a checkpoint, up to its name: of a checkout, or of the installed package."""
    return ["./launch.sh", "eval"] if Path("launch.sh").is_file() else ["python", "-m", "coconut_ds", "eval"]


def _layout(config: RunConfig, stage: int) -> int:
    """Stages after the last latent one share its successor's layout, without steps; icot's removal goes by tokens."""
    return stage if config.traits.steps == "dropped by token" else min(stage, config.max_latent_stage + 1)


def _best_text(row: EpochEvaluation) -> str:
    share = f"{row.accuracy:.1%} ({row.n_correct}/{row.n_total})"
    return f"accuracy {share} after epoch {row.epoch}, stage {row.stage}"


def summary_table(evaluations: Sequence[EpochEvaluation]) -> str:
    """Accuracy per stage: the last and the best evaluation in each; lengths and cut answers are those of the last."""
    rows = ["stage  epochs   last accuracy   best accuracy   tokens per answer  of them thoughts   cut"]
    for stage in sorted({row.stage for row in evaluations}):
        mine = [row for row in evaluations if row.stage == stage]
        last, best = mine[-1], max(mine, key=lambda row: row.accuracy)
        rows.append(
            f"{stage:>5}  {mine[0].epoch:>2}-{last.epoch:<3}   {last.accuracy:>13.1%}   "
            f"{best.accuracy:>13.1%}   {last.mean_new_tokens:>16.1f}   {_known(last.mean_thoughts, '.1f'):>16}   "
            f"{_known(last.n_cut, 'd'):>3}"
        )
    return "\n".join(rows)


def _known(value: float | None, form: str) -> str:
    """The value; a dash for records of earlier versions, which do not have it."""
    return "-" if value is None else format(value, form)


def lengths_text(mean_new_tokens: float, mean_thoughts: float, n_cut: int, max_new_tokens: int) -> str:
    """The lengths of the answers of an evaluation, for its line; the means are per question."""
    parts = ""
    if mean_thoughts:
        parts = f" ({mean_thoughts:.1f} thoughts + {mean_new_tokens - mean_thoughts:.1f} generated)"
    cut = f", {n_cut} cut by max_new_tokens {max_new_tokens}" if n_cut else ""
    return f"{mean_new_tokens:.1f} tokens per answer{parts}{cut}"


def evaluation_text(config: RunConfig, path: str, stage: int, evaluation: Evaluation) -> str:
    """One line for an evaluation without training."""
    by_steps = ", ".join(f"{steps} steps {share:.1%}" for steps, share in evaluation.accuracy_by_steps.items())
    lengths = lengths_text(
        evaluation.mean_new_tokens, evaluation.mean_thoughts, evaluation.n_cut, config.max_new_tokens
    )
    return (
        f"{config.load_model_path} on {path}, stage {stage}: accuracy {evaluation.accuracy:.1%} "
        f"({evaluation.n_correct}/{evaluation.n_total}; {by_steps}), chain match {evaluation.cot_match:.1%}, "
        f"loss {evaluation.valid_loss:.4f}, {lengths}, "
        f"{evaluation.examples_per_s:.1f} examples/s"
    )
