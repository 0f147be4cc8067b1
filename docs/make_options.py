"""Writes docs/options.md from the settings that the command lines are made from: `python docs/make_options.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from taylor_pruning.experiment.arguments import TITLES, default_text, parts_of, value_text  # noqa: E402
from taylor_pruning.experiment.command import ExperimentTask, SweepTask  # noqa: E402
from taylor_pruning.options import flag, options  # noqa: E402

INTRODUCTION = """# Options

This page is written by `python docs/make_options.py` from the fields of the settings. `--help` shows the same options.
From Python, `PruningSettings(...)` and `Recipe(...)` take those of the choice of filters and of fine-tuning by the same
names, with `_` for `-`; `--fine-tune-epochs` is `Recipe(epochs=...)`.
"""
TABLE = ["| option | values | default | what it sets | when it helps |", "|---|---|---|---|---|"]


def page() -> str:
    """The content of docs/options.md."""
    shared = parts_of(ExperimentTask)
    sections = {
        "One experiment: `run_single_experiment.py`": shared.pop("task"),
        "A sweep: `run_enhanced_pruning.py`": SweepTask,
        **{f"Both: {TITLES[part]}": settings for part, settings in shared.items()},
    }
    parts = [INTRODUCTION]
    for title, settings in sections.items():
        rows = [_row(f) for f in options(settings) if f.metadata["option"].command_line]
        parts.append("\n".join([f"## {title}\n", *TABLE, *rows]) + "\n")
    hidden = [f for settings in shared.values() for f in options(settings) if not f.metadata["option"].command_line]
    parts.append("\n".join(["## From Python only\n", *TABLE, *(_row(f, python=True) for f in hidden)]) + "\n")
    return "\n".join(parts)


def _row(field, python: bool = False) -> str:
    about = field.metadata["option"]
    name = f"`{field.name}`" if python else f"`{flag(field)}`"
    when = " ".join([*(f"With {needed}." for needed in about.needs), about.when])
    cells = [name, value_text(field), default_text(field) or "-", about.help, when]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(page(), encoding="utf-8")
