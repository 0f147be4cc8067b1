"""docs/CONTRIBUTING.md names functions and files that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_place_that_the_page_names_exists():
    page = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py):(\w+)`", page)
    assert len(places) >= 20
    for path, name in places:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{path} has no {name}"
    for path in re.findall(r"(?:tests|taylor_pruning|docs|\.ci)/[\w/.]*\w", page):
        assert (ROOT / path).exists(), path
