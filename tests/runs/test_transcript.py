"""The transcript of the demo: its block, its bars, its closing lines, and nothing else."""

from __future__ import annotations

import re
import sys

import hops
import launching
import pytest

BLOCK = [
    r"transcript",
    r"  method    coconut, window \[0\.6, 0\.3, 0\.1\] \(sequence\)",
    r"  model     scratch \(llama\), 0\.\d\d M parameters, fp32",
    r"  devices   2 x cpu, ds_configs/zero2_offload\.json",
    r"  data      128 training examples, 16 for validation",
    r"  batch     64 examples per step = 32 per micro-batch x 1 accumulated x 2 ranks",
    r"  stages    0 in 1, 1 in 2, 2 in 3, no step left in 4 of 4 epochs, 2 steps each",
    r"  memory    \d\.\d\d GiB of model states \+ \d\.\d\d GiB of activations of host memory per rank, planned",
    r"  folder    .*/transcript \(run\.log has what libraries say\)",
]
LENGTHS = r"\d+\.\d tokens per answer( \(\d\.\d thoughts \+ \d+\.\d generated\))?(, \d+ cut by max_new_tokens \d+)?"
EVALUATIONS = [
    rf"epoch {epoch}/4, stage {epoch - 1}: accuracy \d+\.\d% \(\d+/16\), loss \d+\.\d{{4}}, "
    rf"{LENGTHS}(, best so far)?"
    for epoch in range(1, 5)
]
BEST = r"accuracy \d+\.\d% \(\d+/16\) after epoch \d, stage \d"
LAST = rf"  last      {BEST}, the best of the last stage"
CLOSING = [
    r"stage  epochs   last accuracy   best accuracy   tokens per answer  of them thoughts   cut",
    *(rf" +{stage}  +{stage + 1}-{stage + 1} +\d+\.\d% +\d+\.\d% +\d+\.\d +\d\.\d +\d+" for stage in range(4)),
    r"",
    rf"  best      {BEST}",
    LAST,
    r"  evaluate  \./launch\.sh eval .*/transcript/checkpoints/epoch_0004 test_path=.*/hops_test\.json",
    r"  report    python -m coconut_ds\.report .*/transcript",
    r"thoughts  after epoch  own thoughts +95% interval  another question's +95% interval",
    *(rf"{2 * n} +{n + 1} +\d+\.\d% +\d+\.\d to \d+\.\d( +\d+\.\d% +\d+\.\d to \d+\.\d)?" for n in range(2)),
    r"4 +4 +\d+\.\d% +\d+\.\d to \d+\.\d +\d+\.\d% +\d+\.\d to \d+\.\d",
    r"",
    r"thoughts of 16 questions exchanged with another question's: accuracy \d+\.\d% -> \d+\.\d%, and "
    r"\d+\.\d% give the other question's answer",
    r"report: .*/transcript/report/report\.html",
]
# Of a model that is trained this little answers may well not end.
CUT = r"(warning:|  warning  ) \d+ of 16 answers reached max_new_tokens \(\d+\) before their end and are compared as .*"
BAR = re.compile(
    r" *|epoch \d/4, stage \d +\d+%\|.*\| \d/2(, loss \d+\.\d{3}, [\d.e+]+ examples/s, ETA \d+:\d\d this epoch, "
    r"\d+:\d\d this run)?|evaluating, (loss|answers): .*|(thoughts|next steps): .*"
)


DATA = {"train": "train", "val": "valid", "test": "test"}


@pytest.fixture
def command(tmp_path) -> list[str]:
    sizes = ["--train", "128", "--valid", "16", "--test", "16"]
    assert hops.main(["generate", "--out", str(tmp_path), *sizes]) == 0
    data = [f"{key}_path={tmp_path}/hops_{split}.json" for key, split in DATA.items()]
    run = ["name=transcript", "epochs_per_stage=1", "max_latent_stage=2", "num_epochs=4"]
    return ["./launch.sh", "demo", f"save_path={tmp_path}", *run, *data]


def environment() -> dict[str, str]:
    return {"VIRTUAL_ENV": sys.prefix, "RANKS": "2", "MASTER_PORT": str(launching.free_port())}


def demand_nothing_else(lines: list[str]) -> None:
    expected = [*BLOCK, *EVALUATIONS, *CLOSING]
    if not any(line.startswith("  last ") for line in lines):
        expected.remove(LAST)
    shown = "\n".join(lines)
    lines = [line for line in lines if not re.fullmatch(CUT, line)]
    assert len(lines) == len(expected), shown
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r} in\n{shown}"


@pytest.mark.ranks
def test_on_a_terminal(command, tmp_path):
    shown = launching.on_terminal(command, **environment())
    lines, bars = [], []
    for line in shown.rstrip("\n").split("\n"):
        # A bar is drawn over with carriage returns, and wiped before a line is written.
        *drawn, last = line.split("\r")
        bars += drawn
        lines.append(last)
    demand_nothing_else(lines)
    strange = [bar for bar in bars if not BAR.fullmatch(bar)]
    assert not strange, strange
    for epoch in range(1, 5):
        assert any(bar.startswith(f"epoch {epoch}/4") and "examples/s" in bar for bar in bars)
    assert "deepspeed_shm_comm_op" in (tmp_path / "transcript" / "run.log").read_text()


@pytest.mark.ranks
def test_in_a_file(command, tmp_path):
    done = launching.finish(launching.start(command, **environment()))
    assert done.returncode == 0, done.stdout
    demand_nothing_else(done.stdout.splitlines())
    assert (tmp_path / "transcript" / "report" / "report.html").is_file()


@pytest.mark.ranks
def test_verbose_shows_what_libraries_say(command, tmp_path):
    done = launching.finish(launching.start([*command, "--verbose", "num_epochs=1"], **environment() | {"RANKS": "1"}))
    shown = done.stdout
    assert done.returncode == 0, shown
    assert "epoch 1/1, stage 0: accuracy" in shown
    assert "no thoughts exchanged: " in shown, "there are none after one epoch"
    assert "+ deepspeed --num_gpus 1" in shown
    assert "[INFO]" in shown
    assert not (tmp_path / "transcript" / "run.log").exists()
