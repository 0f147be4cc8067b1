"""`pip install .` gives the five modules, the package with its data and the two commands, away from this folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from image_files import write_folder

ROOT = Path(__file__).parents[1]
TINY = [
    "--model", "vgg7_bn", "--train-epochs", "0", "--fine-tune-epochs", "0", "--calibration-samples", "6",
    "--rounds", "1", "--device", "cpu", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new virtual environment with the project installed; its dependencies are those of the running environment."""
    builds_wheels = find_spec("setuptools") and (find_spec("wheel") or find_spec("setuptools.command.bdist_wheel"))
    if not (find_spec("pip") and builds_wheels):
        pytest.skip("pip and a setuptools that builds wheels are needed to install without a network")
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build writes into the folder that it reads
    shutil.copytree(ROOT / "taylor_pruning", source / "taylor_pruning")
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(file, source)
    home = folder / "environment"
    venv.create(home, symlinks=os.name != "nt")
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    running = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (purelib / "dependencies.pth").write_text("\n".join(running) + "\n")
    python = Path(sysconfig.get_path("scripts", "venv", {"base": str(home), "platbase": str(home)})) / "python"
    install = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    shutil.rmtree(source)
    return python.parent


def run(environment, tmp_path, *command):
    """The command in an empty folder; PYTHONPATH may not lead back to the sources."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    program, *arguments = command
    return subprocess.run([str(environment / program), *arguments], cwd=tmp_path, env=variables, check=True,
                          capture_output=True, text=True).stdout  # fmt: skip


def test_the_modules_and_the_data_file_are_installed(environment, tmp_path):
    code = """
import EnhancedFilterPruner, EnhancedPruning, GradientFlowAnalyzer, run_enhanced_pruning, run_single_experiment
from importlib.metadata import distribution
from importlib.resources import files
commands = {entry.name: entry.load() for entry in distribution("enhanced-taylor-pruning").entry_points}
assert commands == {"prune-experiment": run_single_experiment.main, "prune-sweep": run_enhanced_pruning.main}
print(EnhancedPruning.__file__)
print(len(files("taylor_pruning.experiment").joinpath("imagenet_synsets.txt").read_text().split()))
"""
    place, synsets = run(environment, tmp_path, "python", "-c", code).split()
    assert Path(place).is_relative_to(environment.parent) and synsets == "1000"
    assert (environment / "prune-sweep").exists()


def test_an_experiment_runs_from_another_folder(environment, tmp_path):
    write_folder(tmp_path / "images")
    out = run(environment, tmp_path, "prune-experiment", "--data-path", "images", *TINY)
    folder = tmp_path / "runs" / "prune-experiment-vgg7_bn"
    assert json.loads((folder / "results.json").read_text())["environment"]["git_commit"] is None
    assert (folder / "pruned_model.pt").exists() and f"Files in {folder.relative_to(tmp_path)}" in out


def test_both_lists_of_requirements_agree():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert (ROOT / "requirements.txt").read_text().split() == wanted
