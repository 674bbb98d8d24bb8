"""The names in a run folder stand in one module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from launching import ROOT

from coconut_ds.runs.paths import RunFolder, epoch_name, epoch_of, is_within_epoch

FILES = "run_config.yaml ds_config.json environment.json metrics.jsonl run.log run.lock wandb_run_id.txt report.html"
ALONE = {*FILES.split(), "latest", ".tmp", ".removed", ".damaged", "_step_"}
"""Names that mean nothing else."""
JOINED = r'(?:/ |Path\([^)]*, )f?"(?:predictions|tensorboard|report|checkpoints)\b'
"""Names that are also keys and words, where they are joined to a path."""
NUMBERED = r'f"epoch_\{|epoch_\*|:04d\}|"epoch_"'


def test_they_stand_nowhere_else():
    for path in (ROOT / "coconut_ds").rglob("*.py"):
        if path.relative_to(ROOT / "coconut_ds") == Path("runs/paths.py"):
            continue
        text = path.read_text(encoding="utf-8")
        constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        assert not constants & ALONE, path
        assert not re.search(f"{JOINED}|{NUMBERED}", text), path


def test_they_are_what_runs_have_always_had():
    folder = RunFolder(Path("runs/mine"))
    assert str(folder) == "runs/mine"
    names = [folder.run_config, folder.ds_config, folder.environment, folder.metrics, folder.log, folder.lock]
    assert [path.name for path in [*names, folder.wandb_id]] == FILES.split()[:-1]
    assert folder.checkpoint(3) == Path("runs/mine/checkpoints/epoch_0003")
    assert folder.checkpoint(3, step=420) == Path("runs/mine/checkpoints/epoch_0003_step_00000420")
    assert folder.latest == Path("runs/mine/checkpoints/latest")
    assert folder.predictions_file(epoch_name(12)) == Path("runs/mine/predictions/epoch_0012.jsonl")
    assert (folder.tensorboard, folder.report) == (Path("runs/mine/tensorboard"), Path("runs/mine/report"))


def test_names_are_read_back():
    folder = RunFolder(Path("runs/mine"))
    assert (epoch_of(epoch_name(12)), epoch_of("epoch_10000"), epoch_of("eval_test")) == (12, 10000, None)
    assert epoch_of(folder.checkpoint(3, step=420).name) is None
    assert is_within_epoch(folder.checkpoint(3, step=420))
    assert not is_within_epoch(folder.checkpoint(3))


def test_only_published_checkpoints_are_found_oldest_first(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.found_checkpoints() == []
    published = [folder.checkpoint(1), folder.checkpoint(1, step=7), folder.checkpoint(2)]
    for path in [*reversed(published), *(path.with_name(path.name + ".tmp") for path in published)]:
        path.mkdir(parents=True)
    folder.checkpoint(3).with_name("epoch_0003.damaged").mkdir()
    folder.latest.touch()
    assert folder.found_checkpoints() == published
