"""The report on how second derivatives were computed says what the scores come from."""

import pytest

from EnhancedFilterPruner import EnhancedFilterPruner
from run_single_experiment import curvature_line


def test_a_smooth_network_has_the_gauss_newton_part(silu_network, images, batches):
    """From four class directions, or from some of them and a random one."""
    for probes, sampled in ((None, 0), (2, 0.5)):
        pruner = EnhancedFilterPruner(silu_network, images, class_probes=probes, progress=False)
        report = pruner.rank(batches).curvature_report()
        assert report["path"] == "gauss-newton" and report["sampled"] == pytest.approx(sampled, abs=0.3)
        assert "silu" in report["reason"] and ("random directions" in curvature_line(report)) == (sampled > 0)


@pytest.mark.parametrize(
    ("order", "compensated", "fields", "path", "sampled"),
    [
        (2, True, {}, "directions", 1),
        (2, True, {"curvature": "hvp"}, "directions", 1),
        (2, True, {"class_probes": 3}, "exact", 0),  # of four classes
        (3, True, {}, "exact", 0),
        (2, False, {}, "exact", 0),
        (2, False, {"class_probes": 2}, "directions", 0.5),
        (2, False, {"curvature": "hvp", "class_probes": 2}, "hvp", None),
        (1, True, {}, None, None),
        (1, False, {"curvature": "hvp"}, None, None),
    ],
)
def test_the_report_says_what_the_scores_come_from(plain_network, images, batches, order, compensated, fields, path,
                                                   sampled):  # fmt: skip
    pruner = EnhancedFilterPruner(plain_network, images, order, progress=False, **fields)
    report = pruner.rank(batches, batches if compensated else None).curvature_report()
    assert report["path"] == path and report["sampled"] == (
        sampled if sampled is None else pytest.approx(sampled, abs=0.3)
    )
    assert ((report["h_error"] or 0) > 0) == (order > 1 and (compensated or sampled != 0))
    assert report["reason"].startswith("behind compensation") == (compensated and order > 1)
    line = curvature_line(report)
    assert line.startswith(f"curvature: {path or 'none'} (") and ("random directions" in line) == (path == "directions")
