"""The documentation is true: its commands run, its links lead somewhere, its records and messages are real.

Commands run page by page in one copy of the tree, because those of a page build on each other, made small by `RULES`.
A command that no rule fits fails with its file and line: give it a rule, or one without changes to run it as it stands.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hardware
import hops
import launching
import prontoqa_generator
import prosqa
import pytest
import tiny
import torch
import word_sums
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, GPT2LMHeadModel
from warm_commands import Shell

from coconut_ds.commands import launcher
from coconut_ds.data.files import read_records
from coconut_ds.engine import hostfile
from coconut_ds.engine.operator_build import waiting_text
from coconut_ds.errors import InputError
from coconut_ds.model.scratch import word_tokenizer
from coconut_ds.runs.lock import run_folder_held
from coconut_ds.runtime import usable_gpu
from coconut_ds.runtime.nvidia_smi import Gpu, Properties
from coconut_ds.runtime.torch_settings import prepare_device

ROOT = Path(__file__).resolve().parents[2]
DATASETS = "docs/datasets"
TROUBLES = "docs/TROUBLESHOOTING.md"
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))

GPT2 = "stand_in_for_gpt2"
SMALL = "num_epochs=1 batch_size_training=4 train_batch_size=8 eval_batch_size=8 max_new_tokens=8"
FEW = "--train 24 --valid 6 --test 6"
FOUR_EPOCHS = f"{SMALL} num_epochs=4 epochs_per_stage=1"
ONE_EPOCH = "num_epochs=1 batch_size_training=64 train_batch_size=128 max_new_tokens=8"
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "PYTHONPATH": "without_waits"}


@dataclass(frozen=True)
class Rule:
    """What becomes of the commands that `fits` is found in: `replaced` (pattern, text), then `appended`.

    `says` has to be in the output, `status` is how the command has to end. `is_read` commands are not run: bash has to
    understand them, and every option has to be one that `--help` names.
    """

    fits: str
    appended: str = ""
    replaced: tuple[tuple[str, str], ...] = ()
    status: int = 0
    says: str = ""
    is_read: bool = False
    environment: tuple[tuple[str, str], ...] = ()


# An epoch is enough, but for the demo, which is looked into, and for a run that starts at its fourth.
FIRST_EPOCH = (r"epoch_00\d\d", "epoch_0001")
FOURTH_EPOCH = (r"epoch_00\d\d", "epoch_0004")
RULES = (
    # What cannot be run here.
    Rule(r"^python benchmarks/", is_read=True),
    Rule(r"^#!/bin/bash\n#SBATCH", is_read=True),
    Rule(r"^\./launch\.sh test", appended="--collect-only --quiet", says="test_documentation.py"),
    Rule(r"\.py download", status=2, says="put it at", environment=tuple(NO_NETWORK.items())),
    # The environment is there and active.
    Rule(r"^\./launch\.sh setup", replaced=((r" && source \S+$", ""),)),
    # Data: the same, less of it.
    Rule(r"^python preprocessing/(prosqa|prontoqa|hops|word_sums)\.py generate", appended=FEW),
    Rule(r"^python preprocessing/prontoqa\.py convert", appended="--train 24 --valid 6"),
    Rule(r"^python preprocessing/prosqa\.py ood", appended="--count 4"),
    Rule(r"^python preprocessing/(hops|word_sums)\.py ood"),
    Rule(r"^python preprocessing/gsm8k\.py convert", says="0 malformed"),
    Rule(r"^python preprocessing/\w+\.py (check|stats)"),
    Rule(r"^python - <<"),
    # Runs.
    Rule(r"--dry-run", says='"train_micro_batch_size_per_gpu"'),
    Rule(r"^\./launch\.sh eval runs/(gsm_coconut|demo)/", replaced=(FOURTH_EPOCH,), says="accuracy"),
    Rule(r"^\./launch\.sh eval", replaced=(FIRST_EPOCH,), says="accuracy"),
    Rule(r"^\./launch\.sh demo", appended=FOUR_EPOCHS, says="report.html"),
    Rule(r"^python -m coconut_ds\.report", says="report.html"),
    Rule(r"^python -m coconut_ds\.ask runs/demo/", replaced=(FOURTH_EPOCH,)),
    Rule(r"^python -m coconut_ds\.inspect_latents runs/demo\w*/", replaced=(FOURTH_EPOCH,)),
    Rule(r"^python -m coconut_ds inspect runs/demo --by-stage", says="exchanged with another question's"),
    Rule(r"^\./launch\.sh sweep run_configs/demo_comparison\.txt"),
    Rule(r"run_configs/sums\.yaml .*model_id=openai", appended=f"{ONE_EPOCH} model_id={GPT2}"),
    Rule(r"^\./launch\.sh run_configs/sums\.yaml", appended=ONE_EPOCH),
    Rule(r"^python -m coconut_ds\.export", replaced=(FIRST_EPOCH,), says="written"),
    Rule(r"^python -m coconut_ds\.plan .*run_configs/sums\.yaml", appended=SMALL, says="largest micro-batch"),
    Rule(r"^python -m coconut_ds\.plan", appended=f"{SMALL} model_id={GPT2}", says="largest micro-batch"),
    Rule(r"run_configs/prosqa_symbolic\.yaml", appended=f"{SMALL} model.n_embd=16 model.n_head=2"),
    Rule(r"gsm_coconut\.yaml", replaced=(FIRST_EPOCH,), appended=f"{SMALL} model_id={GPT2} num_epochs=4"),
    Rule(
        r"(^deepspeed|^\./launch\.sh).* ?run_configs/\w+\.yaml",
        replaced=(FIRST_EPOCH,),
        appended=f"{SMALL} model_id={GPT2}",
    ),
    Rule(r"^python -m coconut_ds\.compare", says="accuracy"),
)


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language with the number of their first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start(1)) + 1, block[1]


def commands(page: str) -> Iterator[Command]:
    """The commands of a page in order; continued lines and here-documents belong to theirs, a script is one."""
    for first, block in blocks(page, "bash"):
        if block.startswith("#!"):
            yield Command(page, first, block)
            continue
        lines = list(enumerate(block.splitlines(), start=first))
        while lines:
            number, text = lines.pop(0)
            here = re.search(r"<<'(\w+)'", text)
            while text.endswith("\\") or (here and text.splitlines()[-1] != here[1]):
                text = f"{text.removesuffix(chr(92))}{chr(10) if here else ' '}{lines.pop(0)[1]}"
            if not here:
                text = " ".join(re.sub(r"(^|\s)#.*", "", text).split())
            if text:
                yield Command(page, number, text)


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Iterator[Shell]:
    """A copy of the tree with small sets where they cannot be fetched, and a model in place of GPT-2."""
    tree = tmp_path_factory.mktemp("tree") / "coconut_ds"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    (tree / "without_waits").mkdir()
    (tree / "without_waits" / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    write_gsm8k_text(tree)
    write_official_prontoqa(tree)
    write_prosqa(tree / "data" / "prosqa")
    # Where the demo finds its data it makes none, 19,200 questions of it.
    assert hops.main(["generate", "--out", str(tree / "data" / "demo"), *FEW.split()]) == 0
    write_prosqa(tree / "data" / "demo_prosqa", n_nodes=7, min_steps=2, max_steps=2, form="edges")
    shorten_sweep(tree / "run_configs" / "demo_comparison.txt")
    write_gpt2(tree / GPT2)
    for page in PAGES:
        for _, block in blocks(page, "yaml"):
            if named := re.match(r"# (\S+\.yaml)\n", block):
                (tree / named[1]).write_text(block, encoding="utf-8")
    with Shell(tree, tree.parent / "stand_ins") as shell:
        yield shell


def write_gsm8k_text(tree: Path) -> None:
    lines = [f"Ann has {n} pens and buys {n}.  How many?||<<{n}+{n}={2 * n}>> #### {2 * n}\n" for n in range(1, 17)]
    for split in ("train", "valid", "test"):
        (tree / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def write_official_prontoqa(tree: Path) -> None:
    trials = {}
    for number, record in enumerate(prontoqa_generator.generate(40, "documentation", hops=5)):
        question, query = record["question"].split(" True or false: ")
        trials[f"example{number}"] = {
            "test_example": {
                "question": question,
                "query": f"True or false: {query}",
                "chain_of_thought": prontoqa_generator.proof_sentences(record["steps"]),
                "answer": record["answer"],
            }
        }
    (tree / "5hop_0shot_random.json").write_text(json.dumps(trials), encoding="utf-8")


def write_prosqa(folder: Path, **shape: Any) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("valid", 6), ("test", 6)):
        records = list(prosqa.generate(count, split, **shape))
        (folder / f"prosqa_{split}.json").write_text(json.dumps(records), encoding="utf-8")


def shorten_sweep(path: Path) -> None:
    """Two seeds of its first line, an epoch each."""
    runs = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    path.write_text(re.sub(r"seeds=\S+", f"seeds=[0,1] {SMALL}", runs[0]) + "\n", encoding="utf-8")


def write_gpt2(folder: Path) -> None:
    """A GPT-2 of one layer whose tokenizer knows the words of the sets above; the others are unknown to it."""
    words = [*prosqa.PERSONS, *prosqa.CONCEPTS, "<<", "Every", "Is", "a", "is", "or"]
    tokenizer = word_tokenizer(words, 1024)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=1024, n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_bert(folder: Path) -> None:
    """A causal language model with a head of several layers."""
    torch.manual_seed(0)  # a page quotes how far its logits are apart
    tokenizer = word_tokenizer(["Alex is a wumpus"], 64)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModelForCausalLM.from_config(BertConfig(vocab_size=len(tokenizer), is_decoder=True, **shape)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_every_command_of_a_page_runs(shell, page):
    problems = [problem for command in commands(page) if (problem := problem_with(shell, command))]
    assert not problems, "\n\n".join(problems)


def problem_with(shell: Shell, command: Command) -> str | None:
    """What is wrong with a command, made small by its rule; None where it does what it should."""
    rule = next((rule for rule in RULES if re.search(rule.fits, command.text)), None)
    if rule is None:
        return f"{command}\nno rule of tests/project/test_documentation.py fits this command"
    if rule.is_read:
        return problem_of_reading(shell, command)
    text = command.text
    for pattern, replacement in rule.replaced:
        text = re.sub(pattern, replacement, text)
    outcome = shell.run(f"{text} {rule.appended}".rstrip(" "), **dict(rule.environment))
    if outcome.status == rule.status and rule.says in outcome.output:
        return None
    wanted = f"status {rule.status}" + (f" and {rule.says!r} in what it says" if rule.says else "")
    return f"{command}\nexit status {outcome.status}, wanted {wanted}\n{outcome.output[-4000:]}"


def problem_of_reading(shell: Shell, command: Command) -> str | None:
    """None where bash understands the command, and the script it starts has every option that it names."""
    outcome = shell.run(f"bash -n <<'END'\n{command.text}\nEND")
    if outcome.status:
        return f"{command}\n{outcome.output}"
    script = re.match(r"python (\S+\.py)", command.text)
    known = shell.run(f"python {script[1]} --help").output if script else command.text
    unknown = [option for option in re.findall(r"--[\w-]+", command.text) if not re.search(rf"{option}\b", known)]
    return f"{command}\nhas no {', '.join(unknown)}\n{known}" if unknown else None


def test_every_rule_is_for_a_command_there_is():
    used = {
        next((rule for rule in RULES if re.search(rule.fits, command.text)), None)
        for page in PAGES
        for command in commands(page)
    }
    assert [rule.fits for rule in RULES if rule not in used] == []


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_a_page_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "coconut_ds|docs|tests|benchmarks|preprocessing|ds_configs|run_configs"
    named = set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*[\w/]", text))
    # Words in capitals stand for a name.
    made = {
        match for each in PAGES for _, block in blocks(each, "yaml") for match in re.findall(r"^# (\S+\.yaml)", block)
    }
    missing = [
        name for name in named - made if not (ROOT / name).exists() and not re.search(r"[A-Z]{3,}\b(?!\.md)", name)
    ]
    modules = {path.name for folder in folders.split("|") for path in (ROOT / folder).rglob("*.py")}
    missing += [name for name in re.findall(r"(?<!No )`(?:\w+/)*(\w+\.py)`", text) if name not in modules]
    assert missing == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.startswith(DATASETS)], ids=lambda page: Path(page).stem
)
def test_the_records_of_a_data_page_are_records(page, tmp_path):
    examples = [block for _, block in blocks(page, "json")]
    assert examples
    for block in examples:
        path = tmp_path / "records.json"
        path.write_text(block, encoding="utf-8")
        for record in read_records(path):
            if "PROSQA" in page:
                assert prosqa.problem_with(record) is None
            if "WORD_SUMS" in page:
                assert word_sums.problem_with(record) is None
            if "PRONTOQA" in page:
                prontoqa_generator.check_record(record)


# Each is done in a folder that `spoiled` has prepared; what it complains of stands in the page.
RUN = "python coconut_ds/train.py --run run.yaml"
EVALUATE = f"{RUN} only_eval=true name=other"
MISTAKES = (
    f"{RUN} batch_size_trainin=4 lr=-1 model.n_layers=3 learning_rate=1 max_samples=9",
    f"{RUN} train_batch_size=10",
    f"{RUN} deepspeed=clash.json",
    f"{RUN} train_path=records.json",
    f"{RUN} train_path=lines.json",
    f"{RUN} train_path=data.json",
    f"{RUN} train_path=data/prosqa/none.json",
    f"{RUN} name=unreached train_path=marked.json",
    f"{RUN} name=unreached train_path=silent.json",
    f"{RUN} name=unreached model=null model_id=openai-community/gpt2",
    f"{RUN} name=unreached model=null model_id=no_weights",
    f"{RUN} name=unreached model=null model_id=no_tokenizer",
    "python -m coconut_ds.plan --run run.yaml --memory 11 model=null model_id=no_tokenizer",
    "./launch.sh eval runs/none/checkpoints/epoch_0001",
    f"{EVALUATE} load_model_path=trained/mine/checkpoints/epoch_0002 c_thought=2 max_latent_stage=1",
    f"{EVALUATE} load_model_path=copied",
    f"{EVALUATE} load_model_path=trained/mine/checkpoints/epoch_0002 max_new_tokens=1",
    f"{RUN} save_path=one_cut",
    f"{RUN} save_path=all_unsealed",
    "python -m coconut_ds.export incomplete out",
    "python -m coconut_ds.export pieces out",
    f"{RUN} name=unreached model=null model_id=bert",
)
GOOD = {"question": "one ?", "steps": ["a b"], "answer": "b"}
FILES = {
    "clash.json": """{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2, "overlap_com": true},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}, "fp16": {"enabled": true}}""",
    "records.json": '{"question": "a"}',
    "lines.json": '{"question": "a", "steps": [], "answer": "b"}\n' * 2,
    "data.json": '[{"question": "a", "step": ["x"], "answer": "b"}]',
    "marked.json": json.dumps([GOOD, {**GOOD, "question": "a <|latent|> b"}]),
    "silent.json": json.dumps([GOOD, {**GOOD, "answer": ",,"}]),
    "doubtful.json": json.dumps(
        [
            GOOD,
            {**GOOD, "question": "two ?", "steps": ["a", ""]},
            GOOD,
            {**GOOD, "answer": "c"},
            {**GOOD, "question": "four ?", "answer": "a\n### b"},
            {**GOOD, "question": "five ?", "steps": ["<|unknown|>"]},
            {**GOOD, "question": "six ?", "answer": "1,5"},
            {**GOOD, "question": "seven ?", "answer": "15"},
            {**GOOD, "question": "eight ?"},
        ]
    ),
}


@pytest.fixture(scope="module")
def spoiled(shell) -> Shell:
    """The tree with a run of two epochs and copies of it that are damaged in their ways, and with `FILES`."""
    tree = shell.tree
    run = tiny.run(tree / "tiny") | {"name": "mine", "save_path": "trained", "num_epochs": 2, "lr": 1e-3}
    run |= {"batch_size_training": 8, "train_batch_size": 8, "deepspeed": "ds_configs/zero0.json"}
    launching.write_run(run, tree)
    for less, files in (("no_weights", "*.safetensors"), ("no_tokenizer", "tokenizer*")):
        shutil.copytree(tree / GPT2, tree / less, ignore=shutil.ignore_patterns(files))
    for name, text in FILES.items():
        (tree / name).write_text(text, encoding="utf-8")
    outcome = shell.run(RUN)
    assert outcome.status == 0, outcome.output
    newest = Path("mine", "checkpoints", "epoch_0002")
    shutil.copytree(tree / "trained" / newest, tree / "copied")
    for copy in ("one_cut", "all_unsealed"):
        shutil.copytree(tree / "trained", tree / copy)
    (tree / "copied" / "exp_avg.safetensors").unlink()
    weights = tree / "copied" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    os.truncate(tree / "one_cut" / newest / "model" / "model.safetensors", 100)
    shutil.copytree(tree / "trained" / newest / "model", tree / "incomplete")
    weights = load_file(tree / "incomplete" / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    save_file(weights, tree / "incomplete" / "model.safetensors", {"format": "pt"})
    (tree / "pieces" / "global_step10").mkdir(parents=True)
    (tree / "pieces" / "global_step10" / "mp_rank_00_model_states.pt").touch()
    write_bert(tree / "bert")
    for manifest in (tree / "all_unsealed").rglob("manifest.json"):
        manifest.unlink()
    return shell


@pytest.mark.parametrize("command", MISTAKES)
def test_the_page_of_troubles_has_what_is_printed(spoiled, command):
    demand_quoted(spoiled.run(command).output)


@pytest.mark.parametrize(("asked", "has"), [("fp16", hardware.PLAIN), ("bf16", "fp16")])
def test_the_page_of_troubles_has_what_is_printed_where_a_precision_is_missing(spoiled, asked, has):
    demand_quoted(spoiled.run(f"{RUN} precision={asked}", **{hardware.VARIABLE: has}).output)


def test_a_cpu_with_fp16_trains_in_it_as_the_page_of_troubles_says(spoiled):
    run = f"{RUN} precision=fp16 name=half num_epochs=1"
    zero1 = f"{run} deepspeed=ds_configs/zero1.json"
    outcome = spoiled.run(zero1, **{hardware.VARIABLE: hardware.WITH_FP16})
    assert outcome.status == 0, outcome.output
    assert "error" not in outcome.output
    refused = spoiled.run(f"{run} deepspeed=ds_configs/zero0.json", **{hardware.VARIABLE: hardware.WITH_FP16})
    assert "0 with fp16 trains on unscaled losses" in refused.output


@pytest.mark.parametrize(
    "command", [RUN, f"{RUN} only_eval=true load_model_path=trained/doubtful/checkpoints/epoch_0001"]
)
def test_the_page_of_troubles_has_what_a_run_warns_of(spoiled, command):
    doubtful = "train_path=doubtful.json val_path=doubtful.json name=doubtful save_path=trained num_epochs=1"
    outcome = spoiled.run(f"{command} {doubtful}")
    assert outcome.status == 0, outcome.output
    warnings = [line for line in outcome.output.splitlines() if line.startswith("warning: doubtful.json")]
    kinds = {re.sub(r".* \d+ of \d+ | \(first.*", "", line) for line in warnings}
    assert len(kinds) == (7 if "only_eval" in command else 8), warnings
    demand_quoted(outcome.output)


def test_of_clean_data_nothing_is_said(spoiled):
    output = spoiled.run(f"{RUN} name=clean num_epochs=1").output
    # A model of one epoch does not end its answers.
    assert [line for line in output.splitlines() if "warning: " in line and "max_new_tokens" not in line] == []


def test_the_page_of_troubles_has_what_is_printed_where_the_port_is_taken(spoiled):
    with socket.create_server(("", 0)) as taken:
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        demand_quoted(spoiled.run(f"{RUN} name=alone", MASTER_PORT=str(taken.getsockname()[1]), **place).output)


def test_the_page_of_troubles_has_what_is_printed_where_the_folder_is_in_use(spoiled):
    with run_folder_held(spoiled.tree / "trained" / "mine"):
        demand_quoted(spoiled.run(RUN).output)


def test_the_page_of_troubles_has_what_is_printed_where_a_hostfile_is_missing(monkeypatch):
    launcher = ["--hostfile", "hostfile", "coconut_ds/train.py"], Path("/home/me/coconut_ds")
    monkeypatch.setattr(hostfile, "_launcher", lambda: launcher)
    with pytest.raises(InputError) as caught:
        hostfile.demand_hostfile()
    demand_quoted(f"error: {caught.value}")


@pytest.mark.parametrize(
    ("name", "driver", "capability", "version", "built_for"),
    [
        ("NVIDIA GeForce RTX 2080 Ti", "580.65.06", (7, 5), "2.13.0+cpu", None),
        ("NVIDIA GeForce RTX 2080 Ti", "535.183.01", (7, 5), "2.13.0", "13.0"),
        ("NVIDIA GeForce GTX 1080 Ti", "580.65.06", (6, 1), "2.13.0", "13.0"),
    ],
    ids=["CPU build", "old driver", "no kernels"],
)
def test_the_page_of_troubles_has_what_is_printed_where_torch_cannot_use_the_gpu(
    monkeypatch, name, driver, capability, version, built_for
):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(usable_gpu, "visible_gpus", lambda: [Gpu(0, name, "")])
    monkeypatch.setattr(usable_gpu, "properties", lambda gpu: Properties(name, capability, driver))
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "1080" in name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120".split)
    with pytest.raises(InputError) as caught:
        usable_gpu.demand_usable_gpus()
    demand_quoted(f"error: {caught.value}")


def test_the_page_of_troubles_has_what_is_printed_for_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(launcher, "gpus_to_use", lambda: [0, 1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    options = argparse.Namespace(ranks="4", master_port=None, verbose=False, dry_run=False)
    with pytest.raises(InputError) as caught:
        launcher.trainer_command("run.yaml", [], options)
    demand_quoted(f"error: {caught.value}")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError) as caught:
        prepare_device()
    demand_quoted(f"error: {caught.value}")


def test_the_page_of_troubles_has_what_is_printed_when_a_finished_run_is_started_again(spoiled):
    records = json.loads((spoiled.tree / "tiny" / "prosqa_train.json").read_text(encoding="utf-8"))
    environment = spoiled.tree / "trained" / "mine" / "environment.json"
    text = environment.read_text(encoding="utf-8")
    values = json.loads(text)
    values["data"]["train_path"] |= {"sha256": "f" * 64, "examples": len(records) + 1}
    environment.write_text(json.dumps(values), encoding="utf-8")
    output = spoiled.run(f"{RUN} lr=3e-3 num_epochs=1").output
    environment.write_text(text, encoding="utf-8")
    said = [line for line in output.splitlines() if re.search("is finished, |^  - |^To train with ", line)]
    assert len(said) == 5, output
    demand_quoted(output)
    assert {general(line) for line in said} <= quoted()


def test_the_page_of_troubles_has_what_is_said_while_a_lock_file_is_waited_for(tmp_path):
    lock = tmp_path / "torch_extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    (lock.parent / "cpu_adam.so").touch()
    lock.touch()
    left = waiting_text(lock)
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as builder:
        compiled = waiting_text(lock)
        builder.kill()
    for line in (left, compiled):
        assert general(line.replace(str(tmp_path), "/home/me/coconut_ds/.venv")) in quoted()


def quoted() -> set[str]:
    return {general(line) for _, block in blocks(TROUBLES, "text") for line in block.splitlines()}


def demand_quoted(output: str) -> None:
    """Every line in which a run complains stands in the page, but for numbers."""
    complaints = [
        line for line in output.splitlines() if re.match("error: |warning: |  - |.* is damaged|resuming from", line)
    ]
    assert complaints, output
    for line in complaints:
        assert general(line) in quoted(), f"{line}\nstands nowhere in {TROUBLES}"


def general(line: str) -> str:
    """A message without what differs from one attempt to the next: numbers, save_path, how the hub was missed."""
    line = re.sub(r"process \d+ on .*? since .*?\); ", "process .. on .. since .. (..); ", line)
    line = re.sub(r"SHA-256 [0-9a-f]+", "SHA-256 ..", re.sub(r": /\S+/hostfile is", ": /../hostfile is", line))
    line = re.sub(r"\b(trained|one_cut|all_unsealed)/", "runs/", line)
    return re.sub(r"\d[\d.,]*", "0", re.sub(r"not give it \(\w+\)", "not give it (..)", line))


def test_the_examples_are_those_the_generators_make():
    (made,) = prosqa.generate(1, "0/valid")
    assert json.loads(next(blocks(f"{DATASETS}/PROSQA.md", "json"))[1]) == [made]
    (made,) = prontoqa_generator.generate(1, "0/valid", hops=5)
    assert json.loads(next(blocks(f"{DATASETS}/PRONTOQA.md", "json"))[1]) == [made]
