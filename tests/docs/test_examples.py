"""The worked examples, each in a tiny setting: they run, print figures of every stage and draw their picture."""

import importlib.util
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TINY = ["--epochs", "1", "--validation-images", "10"]
CASES = {
    "segmentation": (["--images", "20", "--scoring-images", "4", "8"], r"mIoU +(\d+\.\d) .* (\d+\.\d) M MACs", 3),
    "detection": (["--images", "10", "--repair", "layer"], r"mAP +(\d+\.\d), .* (\d+\.\d) M MACs", 4),
    "regression": (["--images", "30"], r"MAE (\d\.\d+), .* (\d+\.\d+) M MACs", 3),
}


@pytest.mark.parametrize("name", CASES)
def test_an_example_runs_prints_its_figures_and_draws(name, tmp_path, capsys):
    arguments, figures, stages = CASES[name]
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([*TINY, *arguments, "--output", str(tmp_path / "picture.png")])
    found = re.findall(figures, capsys.readouterr().out)
    assert len(found) == stages
    macs = [float(cost) for _, cost in found]
    assert macs[-1] < 0.75 * macs[0]
    assert imread(tmp_path / "picture.png").std() > 0.1, "an empty picture"
