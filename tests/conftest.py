"""Fixtures shared by the tests; nothing here needs a network, a GPU or an account."""

from __future__ import annotations

import os
import tempfile

import hardware

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ[hardware.VARIABLE] = hardware.PLAIN
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Tests neither read nor fill the user's cache of tokenized sets; ranks they start inherit this one.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="coconut_ds_tests_")

# Before torch looks for them. Threads that wait for each other leave the cores to the other worker and to ranks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
from pathlib import Path

import launching
import pytest
import torch

from coconut_ds.data.stages import Curriculum

hardware.settle()
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_addoption(parser):
    parser.addoption("--fresh-ranks", action="store_true", help="start every rank by DeepSpeed's launcher")


def pytest_configure(config):
    launching.fresh_ranks = config.getoption("--fresh-ranks")


def pytest_collection_modifyitems(items):
    """Files that start ranks take longest: they come first, so that no worker is left with one at the end."""
    starting = {item.path for item in items if item.get_closest_marker("ranks")}
    items.sort(key=lambda item: item.path not in starting)


def pytest_runtest_setup(item):
    launching.may_start_ranks = item.get_closest_marker("ranks") is not None


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With CI=true a skip is a failure: nothing may be left out there unseen."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {call.excinfo.value if call.excinfo else item.name}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with raw data and reference runs beside the project; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with raw data and reference runs")
    return folder


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def curriculum():
    """Make a Curriculum from defaults of the published ProsQA run."""

    def make(**changes) -> Curriculum:
        values = {
            "method": "coconut",
            "thoughts_per_step": 1,
            "epochs_per_stage": 5,
            "max_latent_stage": 6,
            "pad_latent_to_max": True,
            "uniform_prob": 0.0,
            "seed": 0,
        }
        return Curriculum(**(values | changes))

    return make


@pytest.fixture
def in_process():
    """For runs inside this process, which leave it in a group, on a port that one started later would ask for."""
    from coconut_ds.runtime import distributed

    before = dict(os.environ)
    yield
    distributed.close()
    os.environ.clear()
    os.environ.update(before)
