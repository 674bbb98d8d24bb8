"""Do the answers of a run depend on its thoughts? Accuracy by stage, with own thoughts and with another question's."""

from __future__ import annotations

from collections.abc import Sequence

from coconut_ds.analysis.inspection.findings import Inspection, Records
from coconut_ds.analysis.inspection.interventions import ask_again, donors, replacements, stacked
from coconut_ds.analysis.intervals import wilson
from coconut_ds.data.stages import Curriculum
from coconut_ds.errors import InputError
from coconut_ds.inference.replies import Question, Reply
from coconut_ds.inference.trained_model import TrainedModel
from coconut_ds.runs.paths import RunFolder
from coconut_ds.runs.read_run import RunRecords
from coconut_ds.runs.thought_use import Share, StageUse, ThoughtUse


def thought_use(run: RunRecords, data: str, records: Records, batch_size: int, seed: int) -> ThoughtUse:
    """The last checkpoint of every number of thoughts on `records`; the last of them all in full.

    `seed` pairs questions. Raises InputError for a run without thoughts or without a checkpoint that has some.
    """
    checkpoints = _last_checkpoints(run, records)
    if not checkpoints or max(checkpoints) == 0:
        raise InputError(
            f"{run.folder} has no checkpoint with thoughts: {run.config.method}, {run.epochs_done} epochs trained; "
            "name a run of coconut that has come to its second stage"
        )
    stages = []
    for n_thoughts, epoch in sorted(checkpoints.items()):
        trained = TrainedModel.load(str(RunFolder(run.folder).checkpoint(epoch)))
        if n_thoughts:
            inspection = Inspection.of(trained, records, batch_size=batch_size)
            shares = _exchange(inspection, seed)
        else:
            shares = {"own": _share([each.correct for each in _answers(trained, records, batch_size)])}
        stages.append(StageUse(n_thoughts=n_thoughts, epoch=epoch, **shares))
    return ThoughtUse(
        data=data,
        n_questions=len(records),
        stages=stages,
        question=Inspection.of(trained, records[:1]).of_question(),
        file=inspection.of_file(),
    )


def _last_checkpoints(run: RunRecords, records: Records) -> dict[int, int]:
    """For every number of thoughts the last epoch that was evaluated with it and whose checkpoint is kept."""
    if run.config.traits.thoughts != "continuous":
        return {}
    curriculum = Curriculum.of(run.config)
    n_steps = max(len(record["steps"]) for _, record in records)
    kept = {path.name for path in RunFolder(run.folder).found_checkpoints()}
    return {
        curriculum.prompt_thoughts(each.stage, n_steps): each.epoch
        for each in run.metrics.evaluations
        # Thoughts are read and exchanged right behind the question.
        if not curriculum.prompt_layout(each.stage, n_steps).n_before
        and RunFolder(run.folder).checkpoint(each.epoch).name in kept
    }


def _exchange(inspection: Inspection, seed: int) -> dict[str, Share]:
    """Accuracy with own thoughts, with all of them another question's, and how many answers then are the other's."""
    _, replies, fed = inspection.answers
    thoughts = stacked(fed)
    questions = [each.question for each in replies]
    instead = replacements("other", thoughts, seed)
    after = ask_again(inspection.trained, questions, instead, None, inspection.new_tokens, inspection.batch_size)
    shares = {"own": _share([each.correct for each in replies]), "exchanged": _share([each.correct for each in after])}
    others = donors(thoughts, seed)
    # Where questions have different numbers of thoughts, one may get those of several others.
    if bool((others == others[:, :1]).all()):
        expected = [questions[other].expected for other in others[:, 0].tolist()]
        shares["followed"] = _share([each.given == answer for each, answer in zip(after, expected)])
    return shares


def _answers(trained: TrainedModel, records: Records, batch_size: int) -> list[Reply]:
    questions = [Question.of(record, index) for index, record in records]
    new_tokens, found = trained.room(questions), []
    for start in range(0, len(questions), batch_size):
        found += trained.ask(questions[start : start + batch_size], new_tokens).replies
    return found


def _share(hits: Sequence[bool]) -> Share:
    low, high = wilson(sum(hits), len(hits))
    return Share(share=sum(hits) / len(hits), low=low, high=high)
