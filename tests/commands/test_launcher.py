"""Runs that the command line starts: how many ranks, on what, and what becomes of signals and exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import stand_ins

from coconut_ds.commands import demo, launcher, sweep
from coconut_ds.errors import InputError
from coconut_ds.runtime.nvidia_smi import Gpu

MODULE = [sys.executable, "-m", "coconut_ds"]
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def run_file(tmp_path) -> Path:
    return launching.write_run({"method": "cot", "train_path": "t", "val_path": "v"}, tmp_path)


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def begin(tmp_path, log):
    """Starts a command, whose launcher is a stand-in, from an empty folder; nothing of it stays."""
    stand_ins.put_launcher(tmp_path / "stand_ins")
    (tmp_path / "empty").mkdir()
    paths = os.pathsep.join([str(tmp_path / "stand_ins"), str(launching.ROOT)])
    started = []

    def start(*words: object, prefix: tuple[str, ...] = (), **more: str) -> subprocess.Popen:
        without = ("DS_ACCELERATOR", "RANKS", "MASTER_PORT")
        inherited = {key: value for key, value in os.environ.items() if key not in without}
        process = subprocess.Popen(
            [*prefix, *MODULE, *map(str, words)],
            cwd=tmp_path / "empty",
            env={**inherited, "PYTHONPATH": paths, "LOG": str(log), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(log: Path, line: str, process: subprocess.Popen, count: int = 1) -> None:
    give_up = time.monotonic() + 60
    while lines(log).count(line) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, lines(log)
        time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the command", "to its group"])
def test_the_first_signal_asks_the_ranks_alone_to_stop(run_file, begin, log, number, send):
    process = begin("train", "--run", run_file, RANK_STATUS="7")
    wait_for(log, "ready", process)
    send(process.pid, number)
    assert ended(process) == (7, "")
    assert lines(log)[1:] == ["ready", "rank SIGTERM"]


def test_a_worker_of_a_rank_is_left_alone(run_file, begin, log):
    process = begin("train", "--run", run_file, RANK_STATUS="0", WORKER="1")
    wait_for(log, "ready", process)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")
    assert lines(log)[1:] == ["ready", "rank SIGTERM"]


def test_the_second_signal_kills_everything(run_file, begin, log):
    process = begin("train", "--run", run_file, RANK_STATUS="never")
    wait_for(log, "ready", process)
    process.send_signal(signal.SIGINT)
    wait_for(log, "rank SIGTERM", process)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (128 + signal.SIGKILL, "")
    time.sleep(0.2)
    assert not left_of(log.parent)


def left_of(folder: Path) -> list[str]:
    """Command lines of processes that still run something in a folder."""
    listed = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and not line.startswith("Z")]


def test_before_there_are_ranks_a_signal_ends_the_launcher(run_file, begin, log):
    process = begin("train", "--run", run_file)
    wait_for(log, "ready", process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 1
    assert lines(log)[1:] == ["ready", "launcher SIGTERM"]


def test_a_signal_that_is_ignored_stays_ignored(run_file, begin, log):
    process = begin("train", "--run", run_file, prefix=("nohup",), RANK_STATUS="3")
    wait_for(log, "ready", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert lines(log)[1:] == ["ready"]
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 3


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_the_exit_status_is_that_of_the_ranks(run_file, begin, status):
    assert ended(begin("train", "--run", run_file, RANK_STATUS=str(status), AT_ONCE="1")) == (status, "")


def test_a_run_file_that_cannot_be_used_starts_nothing(run_file, begin, log):
    status, output = ended(begin("train", "--run", run_file, "lerning_rate=1"))
    assert status == 2
    assert output.startswith(f"error: {run_file}: 1 problem\n  - lerning_rate: unknown key")
    assert lines(log) == []


# The words the launcher gets


def words_of(begin: Start, log: Path, *words: object, **more: str) -> list[str]:
    assert ended(begin(*words, RANK_STATUS="0", AT_ONCE="1", **more))[0] == 0
    (line,) = (line for line in lines(log) if line.startswith("launcher --num_gpus"))
    return line.split()[1:]


def test_options_and_variables_of_the_launcher(run_file, begin, log):
    trainer = str(launching.ROOT / "coconut_ds" / "train.py")
    given = words_of(begin, log, "train", "--run", run_file, "lr=1", RANKS="3", MASTER_PORT="29511")
    assert given == [*"--num_gpus 3 --master_port 29511 --quiet".split(), trainer, "--run", str(run_file), "lr=1"]
    log.unlink()
    options = ["--master-port", 29512, "--verbose", "--ranks", 2, "--dry-run"]
    given = words_of(begin, log, "train", *options, "lr=1", "--run", run_file, "seed=2", RANKS="3")
    run = ["--run", str(run_file), "--dry-run", "--verbose", "lr=1", "seed=2"]
    assert given == [*"--num_gpus 2 --master_port 29512".split(), trainer, *run]


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5"])
def test_numbers_that_are_none_are_refused(run_file, begin, value):
    status, output = ended(begin("train", "--run", run_file, RANKS=value))
    assert (status, output) == (2, f"error: RANKS {value!r}: must be a whole number above 0\n")
    assert "--ranks 'x'" in ended(begin("train", "--run", run_file, "--ranks", "x"))[1]


def test_every_gpu_has_a_rank(run_file, begin, log, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    listing = "#!/bin/sh\nprintf 'GPU 0: H100\\n  MIG 1g\\nGPU 1: H100\\nGPU 2: H100\\n'\n"
    stand_ins.put_executable(tmp_path / "bin" / "nvidia-smi", listing)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert words_of(begin, log, "train", "--run", run_file, PATH=path)[:2] == ["--num_gpus", "3"]


@pytest.fixture
def gpus(monkeypatch, tmp_path) -> None:
    """nvidia-smi lists three cards."""
    stand_ins.put_nvidia_smi(tmp_path / "bin", "RTX 2080 Ti", "RTX 2080 Ti", "RTX 3090")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("RANKS", raising=False)


def placed(ranks: str | None = None) -> list[str]:
    options = launcher.argparse.Namespace(ranks=ranks, master_port=None, verbose=True, dry_run=False)
    return launcher.trainer_command("run.yaml", [], options)[1:3]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("visible", "ranks", "words"),
    [
        ("1", None, ["--include", "localhost:1"]),
        ("2,0", None, ["--include", "localhost:2,0"]),
        ("2,0", "1", ["--include", "localhost:2"]),
        ("GPU-2a, GPU-0", None, ["--include", "localhost:2,0"]),
        ("1,-1,0", None, ["--include", "localhost:1"]),
        ("", "2", ["--num_gpus", "2"]),
    ],
)
def test_the_gpus_of_cuda_visible_devices_are_used_and_no_others(monkeypatch, visible, ranks, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert placed(ranks) == words


@pytest.mark.usefixtures("gpus")
def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InputError, match=r"^4 ranks on 3 GPUs: each rank needs its own; set RANKS or --ranks to 3"):
        placed("4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InputError, match=r"^2 ranks on 1 GPU visible \(CUDA_VISIBLE_DEVICES=0\)"):
        placed("2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(InputError, match=r"nvidia-smi lists no GPU 3; write numbers from 0 to 2"):
        placed()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert placed("4") == ["--num_gpus", "4"]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("visible", "left"), [("1", None), ("", "")])
def test_deepspeed_s_launcher_gets_the_gpus_in_its_words_alone(monkeypatch, tmp_path, visible, left):
    code = "import os, sys\nsys.exit([None, ''].index(os.getenv('CUDA_VISIBLE_DEVICES')))"
    stand_ins.put_launcher(tmp_path, code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with launcher.Launcher() as started:
        assert started.run(["deepspeed", *placed(), "--quiet"]) == [None, ""].index(left)


@pytest.mark.usefixtures("gpus")
def test_deepspeed_s_launcher_takes_the_gpus_of_those_words(monkeypatch):
    """As its runner does it: the filter on a machine of three, and what the ranks are given."""
    from deepspeed.launcher import runner

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    option, value = placed()
    assert runner.parse_args([option, value, "train.py"]).include == value
    assert runner.parse_inclusion_exclusion({"localhost": 3}, value, "") == {"localhost": [0, 2]}


@pytest.mark.parametrize(("cores", "ranks"), [(1, "1"), (2, "2"), (64, "2")])
def test_without_a_gpu_there_are_two_ranks_on_two_cores(monkeypatch, cores, ranks):
    monkeypatch.delenv("RANKS", raising=False)
    monkeypatch.setattr(launcher, "visible_gpus", list)
    monkeypatch.setattr(launcher.os, "cpu_count", lambda: cores)
    options = launcher.argparse.Namespace(ranks=None, master_port=None, verbose=False, dry_run=False)
    assert launcher.trainer_command("run.yaml", [], options)[:3] == ["deepspeed", "--num_gpus", ranks]


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("given", [None, "cuda"])
def test_without_a_gpu_deepspeed_is_told_to_use_the_cpu(monkeypatch, tmp_path, gpus, given):
    stand_ins.put_launcher(
        tmp_path, "import os, sys\nsys.exit(['cuda', 'cpu', None].index(os.getenv('DS_ACCELERATOR')))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR")
    if given:
        monkeypatch.setenv("DS_ACCELERATOR", given)
    monkeypatch.setattr(launcher, "visible_gpus", lambda: [Gpu(0, "H100", "GPU-0")] * gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with launcher.Launcher() as started:
        status = started.run(["deepspeed", "--quiet"])
    assert status == (0 if given else 2 if gpus else 1)


# The commands that start it


def test_an_evaluation_takes_the_run_file_beside_its_checkpoint(run_file, begin, log, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    status, output = ended(begin("eval", checkpoint))
    settings = tmp_path / "run" / "run_config.yaml"
    assert status == 2
    assert f"{checkpoint} has no {settings} beside it; for other weights use python -m coconut_ds train" in output
    run_file.rename(settings)
    given = words_of(begin, log, "eval", f"{checkpoint}/", "test_path=t.json", RANKS="1")
    changed = ["only_eval=true", f"load_model_path={checkpoint}", "resume=0", "test_path=t.json"]
    assert given[given.index("--run") :] == ["--run", str(settings), *changed]
    assert "none is not a checkpoint folder; name one such as" in ended(begin("eval", "none"))[1]


def sweep_of(monkeypatch, *runs: list[str]) -> launcher.argparse.Namespace:
    """Options of a sweep of runs, each by its words, that are not trained yet and taken for finished afterwards."""
    monkeypatch.setattr(sweep, "read_sweep", lambda path: [(words, None) for words in runs])
    monkeypatch.setattr(sweep, "_is_open", lambda config: True)
    monkeypatch.setattr(sweep, "_is_finished", lambda config: True)
    given = {"file": None, "list": False, "ranks": "1", "master_port": None, "verbose": False, "dry_run": False}
    return launcher.argparse.Namespace(**given)


def test_a_sweep_goes_past_a_run_that_fails(monkeypatch, capsys, tmp_path):
    started = {"a": 1, "b": 0, "c": 130}
    monkeypatch.setattr(sweep.Launcher, "run", lambda self, words: started[words[-1].removeprefix("name=")])
    options = sweep_of(monkeypatch, *(["r.yaml", f"name={name}"] for name in "abc"))
    assert sweep._sweep(options) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["failed: r.yaml name=a", "failed: r.yaml name=c"]
    assert captured.out == ""
    assert sweep._sweep(sweep_of(monkeypatch, ["r.yaml", "name=b"])) == 0


@pytest.mark.parametrize("status", [0, 1])
def test_a_signal_reaches_the_run_under_way_and_no_other_starts(monkeypatch, capsys, tmp_path, log, status):
    stand_ins.put_launcher(tmp_path)
    for key, value in {"PYTHONPATH": tmp_path, "LOG": log, "RANK_STATUS": status}.items():
        monkeypatch.setenv(key, str(value))
    options = sweep_of(monkeypatch, ["a.yaml"], ["b.yaml"])
    asker = "import os, pathlib, signal, sys, time\nlog = pathlib.Path(sys.argv[1])\n"
    asker += "while not (log.exists() and 'ready' in log.read_text()):\n    time.sleep(0.02)\n"
    asker += "os.kill(os.getppid(), signal.SIGTERM)"
    with subprocess.Popen([sys.executable, "-c", asker, str(log)]):
        try:
            assert sweep._sweep(options) == status
        except BaseException:
            log.write_text("ready")  # nobody else ends the one that waits for it
            raise
    assert "a.yaml" in lines(log)[0]
    assert lines(log)[1:] == ["ready", "rank SIGTERM"]
    assert capsys.readouterr().out.startswith("stopped as ")


def test_the_demo_is_refused_outside_of_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path)
    assert demo.main([]) == 2
    said = "preprocessing/hops.py, which the installed package does not have; start it in a checkout of coconut_ds"
    assert said in capsys.readouterr().err


def test_the_demo_makes_its_data_once_and_has_two_ranks_at_most(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKS", "4")
    started: list[list[str]] = []
    made: list[Path] = []
    monkeypatch.setattr(demo.Launcher, "run", lambda self, words: started.append(list(words)) or 5)
    monkeypatch.setattr(demo, "_make_data", lambda generator: made.append(generator) or 0)
    assert demo.main(["--control", "seed=1"]) == 5
    (words,) = started
    assert made == [launching.ROOT / "preprocessing" / "hops.py"]
    run = ["--run", str(launching.ROOT / "run_configs" / "demo.yaml")]
    control = ["name=demo_no_cot", "method=no_cot", "latent_context=null", "latent_norm=none", "seed=1"]
    assert words[words.index("--run") :] == [*run, *control]
    assert words[:3] == ["deepspeed", "--num_gpus", "2"]
    (tmp_path / "data" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "demo" / "hops_train.json").touch()
    assert demo.main([]) == 5
    assert len(made) == 1
    assert started[1][-1] == "name=demo"


def test_the_controls_of_the_demo_are_two_runs_with_a_report_each(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []
    reported: list[str] = []
    monkeypatch.setattr(demo.Launcher, "run", lambda self, words: started.append(list(words)) or 0)
    monkeypatch.setattr(demo, "_make_data", lambda generator: 0)
    monkeypatch.setattr(demo.report, "main", lambda arguments: reported.extend(arguments) or 0)
    assert demo.main(["--control"]) == 0
    assert [words[-4:-2] for words in started] == [
        ["name=demo_no_cot", "method=no_cot"],
        ["name=demo_pause_as_thought", "method=pause_as_thought"],
    ]
    assert reported == ["runs/demo_no_cot", "runs/demo_pause_as_thought"]


def test_one_name_for_both_controls_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--control", "name=mine"]) == 2
    assert "name=mine: --control names its two runs itself" in capsys.readouterr().err
