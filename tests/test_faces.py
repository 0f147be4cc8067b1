"""The documented modules from outside: their examples run, their names are there, and nothing below imports them."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACES = {
    "EnhancedPruning": ("EnhancedPruning", "PruningSettings", "InputError", "load_pruned", "save_pruned"),
    "EnhancedFilterPruner": ("ChannelGraph", "EnhancedFilterPruner"),
    "GradientFlowAnalyzer": ("GradientFlowAnalyzer",),
    "run_single_experiment": ("main",),
    "run_enhanced_pruning": ("main",),
}


@pytest.mark.parametrize("face", FACES)
def test_a_face_has_its_names_and_its_example_runs(face):
    module = importlib.import_module(face)
    assert all(hasattr(module, name) for name in FACES[face])
    failed, run = doctest.testmod(module)
    assert failed == 0 and (run > 0 or face.startswith("run_"))


def test_settings_have_the_names_of_the_options():
    from EnhancedPruning import PruningSettings

    settings = PruningSettings(budget="macs", rounds=5)
    assert (settings.constraints.budget, settings.constraints.bound, settings.rounds) == ("macs", None, 5)
    assert PruningSettings().constraints.bound == 1.03 and PruningSettings(layer_bound=1.2).constraints.bound == 1.2


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "taylor_pruning").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_below_imports_a_face_and_reports_alone_draw(path):
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & FACES.keys()
    assert ("matplotlib" not in names) or path.parent.name == "report"
    assert path.parent.name != "report" or "torch" not in names
