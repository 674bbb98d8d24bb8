"""What `from coconut_ds import ...` gives a type checker."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
from coconut_ds import Coconut, LatentContext, RunConfig

context = LatentContext((0.6, 0.3, 0.1), scope="sequence")
model: Coconut = Coconut.from_pretrained("folder")
model.save_pretrained("folder", private=True)
rate: float = RunConfig().lr
"""
WRONG = {
    "context.reach.upper()": '"int" has no attribute "upper"',
    "Coconut.from_pretrained(3)": 'Argument 1 to "from_pretrained" of "Coconut" has incompatible type "int"',
    'model.save_pretrained("folder", private="yes")': 'Argument "private" to "save_pretrained" of "Coconut"',
    "RunConfig().learning_rate": '"RunConfig" has no attribute "learning_rate"',
    "LatentContext((0.6,), scope=1)": 'Argument "scope" to "LatentContext" has incompatible type',
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[int, str]:
    """What mypy says, by line, to the right use followed by each wrong one."""
    path = tmp_path_factory.mktemp("typed") / "user.py"
    path.write_text(RIGHT + "\n".join(WRONG) + "\n", encoding="utf-8")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    shown, problems, _ = api.run([*options, "--no-error-summary", str(path)])
    assert not problems
    parts = [line.removeprefix(str(path)).split(":", 2) for line in shown.splitlines() if " error: " in line]
    return {int(number): text for _, number, text in parts}


def test_the_right_use_has_no_error(errors):
    assert min(errors) > RIGHT.count("\n")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_use_has_one(errors, wrong):
    assert WRONG[wrong] in errors[RIGHT.count("\n") + 1 + list(WRONG).index(wrong)]
