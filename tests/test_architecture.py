"""The shape of the package: imports go one way, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "coconut_ds"

LAYERS = (
    ("strict_json",),
    (
        "errors",
        "methods",
        "intervals",
        "pace",
        "watchdog",
        "environment",
        "text_tables",
        "answer_lengths",
        "skipped_steps",
        "figures.canvas",
        "training.sealed_folder",
    ),
    ("comparison_tables", "foreign_keys", "inspection.prosqa_graph", "inspection.tables"),
    ("extras", "run_events", "run_lock", "figures.comparison", "figures.thoughts"),
    ("config", "distributed", "predictions", "engine.model_states"),
    (
        "console",
        "curriculum.answer_form",
        "curriculum.stages",
        "interruption",
        "dashboards",
        "run_records",
        "run_changes",
    ),
    (
        "curriculum.examples",
        "curriculum.collator",
        "model.latents",
        "model.few_rows",
        "model.deferred",
        "model.state_dicts",
        "tracking",
        "memory",
        "engine.ds_config",
        "engine.hostfile",
        "engine.operator_build",
        "figures.curves",
        "report_tables",
    ),
    ("model.weight_gradients", "model.kv_cache", "figures.training", "report_page"),
    ("model.thought_attention",),
    ("model.generation", "model.checkpointing", "model.loss", "model.masks", "model.backbone", "model.card"),
    ("model.pretrained", "curriculum.loaders", "curriculum.plain_text"),
    ("model.self_check", "curriculum.doubts"),
    ("model.coconut",),
    ("model.thoughts", "inspection.continuations"),
    (
        "engine.build",
        "engine.optimizer_states",
        "engine.whole_weights",
        "training.weights",
    ),
    ("engine.stage_boundary", "training.checkpoint", "training.evaluator"),
    ("training.step", "training.activations", "training.trained"),
    (
        "training.batch_size",
        "training.materials",
        "answers",
        "inspection.readings",
        "inspection.next_steps",
    ),
    ("training.trainer", "training.summary", "inspection.interventions", "inspection.averages"),
    ("training.session",),
    ("train", "plan", "export", "compare", "sweep", "report", "ask", "inspect_latents"),
)
LEVEL = {f"coconut_ds.{name}": level for level, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Modules named in import statements; those under `if TYPE_CHECKING:` do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_level():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module):
    for imported in imports(MODULES[module]) & set(LEVEL):
        assert LEVEL[imported] < LEVEL[module], f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_place(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    if "deepspeed" in roots:
        assert module.startswith("coconut_ds.engine.") or module == "coconut_ds.training.checkpoint"
    if "wandb" in roots or "torch.utils.tensorboard" in imports(MODULES[module]):
        assert module == "coconut_ds.dashboards"
    if "matplotlib" in roots:
        assert module.startswith("coconut_ds.figures.")
    if module.startswith("coconut_ds.model."):
        assert "coconut_ds.config" not in imports(MODULES[module]), "the model takes plain arguments"


def test_no_module_shadows_a_library():
    top_level = {path.stem for path in PACKAGE.iterdir() if path.stem != "__init__"}
    libraries = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "evaluate", "tqdm", "yaml"}
    assert not top_level & (set(sys.stdlib_module_names) | libraries)


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "transformers", "deepspeed", "datasets", "wandb")
    code = f"import sys, coconut_ds; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_entry_is_short_and_defines_no_class():
    tree = ast.parse((PACKAGE / "train.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 80
