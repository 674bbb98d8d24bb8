"""Nothing lost: the published command on real ranks, killed, stopped, damaged, out of room, and started again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import faults
import launching
import pytest

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a run that is left alone."""
    folder = tmp_path_factory.mktemp("reliability")
    faults.prepare(folder)
    return folder


def checkpoints(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / name / "checkpoints").glob("epoch_*[0-9]"))


def wait_for_steps(folder: Path, name: str, count: int, process) -> None:
    """Until the run has logged `count` steps."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    give_up = time.monotonic() + launching.TIME_LIMIT_S
    while not metrics.exists() or metrics.read_text().count('"train_step"') < count:
        assert process.poll() is None, f"ended with {process.poll()}"
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(folder):
    places = faults.kill_again_and_again(folder, kills=4, seed=1)
    assert places.total() == 4


def test_checkpoints_within_an_epoch_make_room(folder):
    best = max(launching.events(folder / "runs" / "alone", "eval"), key=lambda event: event["accuracy"])["epoch"]
    expected = {f"epoch_{best:04d}", "epoch_0003_step_00000024", "epoch_0004"}
    assert checkpoints(folder, "alone") == sorted(expected)
    assert (folder / "runs" / "alone" / "checkpoints" / "latest").read_text() == "epoch_0004\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(folder, number):
    run = faults.run_of(folder, f"stopped_by_{number.name}", save_every_steps=None)
    run_file = launching.write_run(run, folder / run["name"])
    ranks = launching.WarmRanks(2, ["coconut_ds/train.py", "--run", str(run_file)])
    try:
        wait_for_steps(folder, run["name"], 4, ranks)
        # One rank is enough: they agree on the step to stop after.
        os.kill(ranks.processes[1].pid, number)
    finally:
        done = ranks.finish()
    assert done.returncode == 0, done.stdout
    (saved,) = checkpoints(folder, run["name"])
    assert (
        f"stopped as requested; the same command resumes from {folder}/runs/{run['name']}/checkpoints/{saved}"
        in done.stdout
    )
    assert "step" in saved
    launching.train(run, folder / run["name"], ranks=2)
    faults.assert_same(folder, run["name"], "alone")


def test_launch_sh_passes_a_signal_on_to_the_ranks(folder):
    run = faults.run_of(folder, "through_launch_sh")
    port = str(launching.free_port())
    command = ["./launch.sh", str(launching.write_run(run, folder / run["name"]))]
    virtual = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    process = launching.start(command, MASTER_PORT=port, RANKS="2", **virtual)
    try:
        wait_for_steps(folder, run["name"], 3, process)
        process.send_signal(signal.SIGTERM)
    finally:
        done = launching.finish(process)
    assert done.returncode == 0, done.stdout
    assert "stopped as requested" in done.stdout


def test_an_exception_on_one_rank_ends_the_job_and_is_shown_once(folder):
    run = faults.run_of(folder, "exception")
    started = time.monotonic()
    status, output = faults.faulty(run, folder / "exception", "1 faulthandler dump_traceback_later 4 raise")
    assert status != 0
    assert time.monotonic() - started < 90
    assert output.count("RuntimeError: a fault put here by a test") == 1, output
    assert output.count("Traceback") == 1, output


def test_a_rank_that_hangs_ends_the_job(folder):
    run = faults.run_of(folder, "hang", hang_limit_s=8)
    started = time.monotonic()
    status, output = faults.faulty(run, folder / "hang", "1 faulthandler dump_traceback_later 4 hang")
    assert status != 0
    assert time.monotonic() - started < 120
    assert "Timeout (0:00:08)!" in output


def test_a_rank_that_hangs_in_an_evaluation_alone_ends_the_job(folder):
    weights = folder / "runs" / "alone" / "checkpoints" / checkpoints(folder, "alone")[-1]
    run = faults.run_of(folder, "hang_in_evaluation", hang_limit_s=8, only_eval=True, load_model_path=str(weights))
    started = time.monotonic()
    fault = "1 faulthandler dump_traceback_later 2 hang"
    status, output = faults.faulty(run, folder / "hang_in_evaluation", fault)
    assert status != 0
    assert time.monotonic() - started < 120
    assert "Timeout (0:00:08)!" in output


def test_a_loss_that_is_not_finite_stops_the_run_with_its_examples(folder):
    run = faults.run_of(folder, "not_finite", lr=1e30, max_grad_norm=0.0, lr_schedule="constant")
    output = launching.train(run, folder / "not_finite", 2, expect=2)
    assert "nothing was updated; rank 0 had training examples [" in output
    assert "; rank 1 had training examples [" in output
    assert "Traceback" not in output
    assert output.count("error: loss") == 1


@pytest.mark.parametrize("call", [5, 40], ids=["first checkpoint", "a later one"])
def test_a_full_disk_leaves_the_checkpoints_before_and_a_clear_message(folder, call):
    run = faults.run_of(folder, f"full_{call}")
    status, output = faults.faulty(run, folder / run["name"], f"0 os fsync {call} full")
    assert status == 2, output
    assert os.strerror(errno.ENOSPC) in output
    assert "cannot be written" in output
    assert not [name for name in checkpoints(folder, run["name"]) if name.endswith(".tmp")]
    launching.train(run, folder / run["name"], ranks=2)
    faults.assert_same(folder, run["name"], "alone")


def test_a_limit_on_the_size_of_files_is_reported_as_well(folder):
    run = faults.run_of(folder, "limited", model={**faults.run_of(folder, "")["model"], "n_embd": 128})
    command = launching.train_command(launching.write_run(run, folder / "limited"), 1)
    process = launching.start(["bash", "-c", 'ulimit -f 512; exec "$@"', "bash", *command])
    done = launching.finish(process)
    assert done.returncode == 2, done.stdout
    assert "checkpoint epoch_0000_step_00000002 cannot be written (there is no earlier one)" in done.stdout


def test_a_folder_that_cannot_be_written_is_said_at_once(folder):
    run = faults.run_of(folder, "nowhere", save_path="/proc/self")
    output = launching.train(run, folder / "nowhere", 1, expect=2)
    assert "save_path: /proc/self/nowhere cannot be made" in output


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path / "exp_avg.safetensors", 1000), "exp_avg.safetensors has 1000 bytes"),
        (lambda path: flip(path / "model" / "model.safetensors"), "model/model.safetensors is not what was written"),
        (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
    ],
    ids=["truncated", "a flipped byte", "a deleted file"],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(folder, damage, said):
    name = "damaged"
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    shutil.copytree(folder / "runs" / "alone", folder / "runs" / name)
    damage(folder / "runs" / name / "checkpoints" / "epoch_0004")
    output = launching.train(faults.run_of(folder, name), folder / name, ranks=2)
    assert "epoch_0004 is damaged and not used" in output
    assert said in output
    assert "resuming from" in output
    assert "epoch_0003_step_00000024" in output
    assert (folder / "runs" / name / "checkpoints" / "epoch_0004.damaged").is_dir()
    faults.assert_same(folder, name, "alone")


def test_a_run_goes_on_under_another_file_and_number_of_ranks(folder):
    still = {**faults.run_of(folder, "")["model"], "dropout": 0.0}
    changes = {"model": still, "gradient_accumulation_steps": None, "train_batch_size": 8, "keep_checkpoints": None}
    launching.train(faults.run_of(folder, "whole", **changes), folder / "whole", ranks=2)
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / "moved")
    # Within the last epoch, after the optimizer was reset.
    last = next(name for name in checkpoints(folder, "moved") if name.startswith("epoch_0003_step"))
    later = [name for name in checkpoints(folder, "moved") if name > last]
    assert later
    for name in later:
        shutil.rmtree(folder / "runs" / "moved" / "checkpoints" / name)
    run = faults.run_of(folder, "moved", **changes, deepspeed="ds_configs/zero3.json")
    output = launching.train(run, folder / "moved", ranks=1)
    assert f"{last}\n" in output
    losses, expected = (faults.outcome(folder, name)[0] for name in ("moved", "whole"))
    assert [step for step, _ in losses] == list(range(1, 25))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    # What is left within an epoch has no place in steps of another size.
    for name in ("epoch_0003_step_00000024", "epoch_0004"):
        shutil.rmtree(folder / "runs" / "moved" / "checkpoints" / name)
    other = faults.run_of(folder, "moved", **{**changes, "train_batch_size": 4})
    output = launching.train(other, folder / "moved", ranks=1, expect=2)
    assert "set train_batch_size: 8 without gradient_accumulation_steps" in output
    # At the end of an epoch another size is possible; the rate goes on from the same share of the schedule.
    for path in (folder / "runs" / "moved" / "checkpoints").glob("epoch_0003_step*"):
        shutil.rmtree(path)
    output = launching.train(other, folder / "moved", ranks=1)
    assert "4 examples per step from here on, 8 before" in output
    rates = [event["lr"] for event in launching.events(folder / "runs" / "moved", "train_step")][18:]
    assert rates == pytest.approx([1e-3 * (22 - step) / 22 for step in range(11, 22)])


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_start(folder):
    name = "all_damaged"
    shutil.copytree(folder / "runs" / "alone", folder / "runs" / name)
    for path in (folder / "runs" / name / "checkpoints").glob("epoch_*"):
        (path / "manifest.json").unlink()
    output = launching.train(faults.run_of(folder, name), folder / name, ranks=2, expect=2)
    n_checkpoints = len(checkpoints(folder, name))
    assert f"all {n_checkpoints} checkpoints are damaged; remove the folder to start over" in output


def test_two_hosts_are_the_same_run_as_one(folder):
    """Two launchers on this machine, each for one of two hosts that exist in the hostfile only."""
    run = faults.run_of(folder, "two_hosts")
    (folder / "hostfile").write_text("hostA slots=1\nhostB slots=1\n")
    one, port = launching.train_command(launching.write_run(run, folder / "two_hosts"), 2), str(launching.free_port())
    script = one.index("coconut_ds/train.py")
    where = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    # As many threads as a rank that shares the machine has: another number changes the last bits.
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    hosts = [
        launching.start([one[0], *where, "--node_rank", str(rank), *one[script:]], OMP_NUM_THREADS=threads)
        for rank in range(2)
    ]
    try:
        done = [launching.finish(host) for host in hosts]
    finally:
        for host in hosts:
            launching.end(host)
    assert [each.returncode for each in done] == [0, 0], done[0].stdout + done[1].stdout
    faults.assert_same(folder, "two_hosts", "alone")
