"""The shape of the package: imports go one way, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "coconut_ds"

ROOMS = (
    *("errors", "strict_json", "config", "runtime", "runs", "data", "model", "model.fast", "engine", "memory"),
    *("checkpoints", "inference", "training", "analysis", "commands", ""),
)
"""In this order: a room imports from itself and from those before it. The last are the entries on the top level."""
DRIVE_DEEPSPEED = tuple(
    f"coconut_ds.{room}."
    for room in ("config.deepspeed_config", "config.deepspeed_file", "engine", "checkpoints", "training")
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Modules named in import statements, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(module: str) -> int:
    """The place of a module's room in the order."""
    name = module.removeprefix("coconut_ds.") + "."
    return ROOMS.index(max((each for each in ROOMS if name.startswith(f"{each}.") or not each), key=len))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("coconut_ds.model.")])
def test_the_model_is_complete_without_its_speed_layer(module):
    if not module.startswith("coconut_ds.model.fast."):
        assert "coconut_ds.model.fast" not in imports(MODULES[module])


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for imported in imports(MODULES[module]) & set(MODULES):
        assert room(imported) <= room(module), f"{module} imports {imported}"


def test_there_is_no_circle():
    graph = {module: imports(path) & set(MODULES) for module, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_place(module):
    names = imports(MODULES[module])
    roots = {name.split(".")[0] for name in names}
    if "deepspeed" in roots:
        assert f"{module}.".startswith(DRIVE_DEEPSPEED)
    if "wandb" in roots or "torch.utils.tensorboard" in names:
        assert module == "coconut_ds.runs.dashboards"
    if "matplotlib" in roots:
        assert module.startswith("coconut_ds.analysis.plots.")
    if module.startswith("coconut_ds.model."):
        assert "coconut_ds.config.run_config" not in names, "the model takes plain arguments"


PRIVATE_NAMES = ("coconut_ds.engine.internals", "coconut_ds.model.internals", "coconut_ds.model.fast.")
"""Where private names of libraries may stand, each checked when a run starts."""
NOT_PRIVATE = {"os._exit", "atexit._run_exitfuncs"}


def private_names(path: Path) -> set[str]:
    """Private attributes of objects that are not `self`, and private modules that are imported."""
    found = {name for name in imports(path) if any(part.startswith("_") for part in name.split("."))}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            # A NamedTuple's own method has an underscore, so that no field can have its name.
            if owner not in ("self", "cls") and node.attr != "_replace":
                found.add(f"{owner}.{node.attr}")
    return {name for name in found if not name.startswith(("coconut_ds.", "__future__"))} - NOT_PRIVATE


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_libraries_stay_in_their_place(module):
    assert module.startswith(PRIVATE_NAMES) or not private_names(MODULES[module])


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
