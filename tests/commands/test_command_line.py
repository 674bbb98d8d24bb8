"""One command line: its verbs, their help pages and old names, and how a command ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import launching
import pytest

from coconut_ds import __main__ as command_line
from coconut_ds.commands.command_line import new_parser, run_command
from coconut_ds.errors import InputError

VERBS = "train eval demo sweep plan ask compare report inspect export".split()
OLD_NAMES = "ask compare export inspect_latents plan report sweep train".split()


def test_without_a_verb_all_of_them_are_listed(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert command_line.main(arguments) == 0
        listed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert [words[0] for words in listed] == VERBS
        assert min(map(len, listed)) > 3


def test_an_unknown_verb_ends_with_status_2_and_a_hint(capsys):
    assert command_line.main(["tran", "--run", "x"]) == 2
    assert "error: unknown command 'tran' (did you mean 'train'?); python -m coconut_ds --help lists" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_page(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m coconut_ds {verb} ")
    assert f"\n    python -m coconut_ds {verb} " in shown, "an example"


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_keep_working(name):
    done = subprocess.run(
        [sys.executable, "-m", f"coconut_ds.{name}", "--help"], cwd=launching.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    program = "train.py" if name == "train" else f"python -m coconut_ds.{name}"
    assert done.stdout.startswith(f"usage: {program} ")


def test_verbs_that_need_no_torch_do_not_import_it():
    code = "import sys\nfrom contextlib import suppress\nfrom coconut_ds.__main__ import main\n"
    code += "for verb in ('train', 'eval', 'demo', 'report', 'compare'):\n"
    code += "    with suppress(SystemExit):\n        main([verb, '--help'])\n"
    code += "print([name for name in ('torch', 'deepspeed', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=launching.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# How a command ends


def ends_with(outcome: int | BaseException | None) -> int:
    def command(options: object) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run_command(command, new_parser("test", None), [])


def test_a_command_s_status_is_the_exit_status(capsys):
    assert [ends_with(outcome) for outcome in (None, 0, 7)] == [0, 0, 7]
    assert ends_with(InputError("x is no y")) == 2
    assert ends_with(KeyboardInterrupt()) == 130
    assert tuple(capsys.readouterr()) == ("", "error: x is no y\n")
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


def test_a_reader_that_has_left_ends_a_command_quietly(tmp_path):
    code = "import sys, time\nfrom coconut_ds.commands.command_line import new_parser, run_command\n"
    code += "sys.exit(run_command(lambda options: print('x' * 100_000), new_parser('test', None), []))"
    script = tmp_path / "script.py"
    script.write_text(code)
    shell = f"set -o pipefail; PYTHONPATH={launching.ROOT} {sys.executable} {script} | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_options_may_stand_between_values(monkeypatch):
    from coconut_ds.commands import plan

    given = {}
    monkeypatch.setattr(plan, "_plan", lambda options: given.update(vars(options)))
    assert plan.main(["--run", "r.yaml", "a=1", "--memory", "11", "b=2"]) == 0
    assert given["overrides"] == ["a=1", "b=2"]
    assert Path(given["run"]) == Path("r.yaml")
